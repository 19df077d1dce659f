//! The services that containerd calls: requests and answers as they are on the wire, and who is connected.
//!
//! May use [`crate::pod`] and what is below it.

pub mod clients;
pub mod sandbox;
pub mod task;
