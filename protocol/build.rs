//! Generates the messages and the ttrpc client and server of the agent's service, and the messages about pods.
#![allow(missing_docs)]

use std::{env, fs, io::Write, path::PathBuf};
use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("agent");
    fs::create_dir_all(&out)?;
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto", "proto/pod.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generator lists the messages' module only.
    let mut modules = fs::OpenOptions::new().append(true).open(out.join("mod.rs"))?;
    writeln!(modules, "pub mod agent_ttrpc;")?;
    Ok(())
}
