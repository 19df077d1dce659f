//! containerd's own life: it ends, is killed and is upgraded while containers and pods run or are being created. Each
//! test has a containerd of its own.

mod features;
mod interrupted;
mod many;
mod restarts;
mod sandbox_service;
