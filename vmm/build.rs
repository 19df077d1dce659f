//! Compiles the seccomp filters.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

#[path = "src/seccomp/filters.rs"]
mod filters;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/seccomp/filters.rs");
    let directory = env::var("OUT_DIR")?;
    for (name, calls, ioctls) in filters::KINDS {
        let program = filters::compile(name, calls, ioctls)?;
        let bytes = program.iter().flat_map(|instruction| {
            let [a, b] = instruction.code.to_le_bytes();
            let [c, d, e, f] = instruction.k.to_le_bytes();
            [a, b, instruction.jt, instruction.jf, c, d, e, f]
        });
        fs::write(Path::new(&directory).join(format!("{name}.bpf")), bytes.collect::<Vec<_>>())?;
    }
    Ok(())
}
