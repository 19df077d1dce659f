//! Generates the messages of the Container Runtime Interface, and of containerd's introspection.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .cargo_out_dir("cri")
        .inputs(["proto/cri.proto", "proto/introspection.proto"])
        .include("proto")
        .run_from_script();
}
