//! Generates the messages of the Container Runtime Interface, and of containerd's own services.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .cargo_out_dir("cri")
        .inputs(["proto/cri.proto", "proto/introspection.proto", "proto/services.proto"])
        .include("proto")
        .run_from_script();
}
