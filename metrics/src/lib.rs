//! Metrics as Prometheus reads them, and a process in such numbers: for the shim and `kata-monitor`.

pub mod histogram;
pub mod process;
pub mod text;
