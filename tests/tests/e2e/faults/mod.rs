//! What fails anywhere, at any moment: processes are killed, and what the host has of something runs out. Nothing stays
//! behind, and an error names what ran out.

mod cycles;
mod deaths;
mod lacks;
mod later_lacks;
