//! Generates the messages of the Container Runtime Interface.

fn main() {
    println!("cargo:rerun-if-changed=proto/cri.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .cargo_out_dir("cri")
        .input("proto/cri.proto")
        .include("proto")
        .run_from_script();
}
