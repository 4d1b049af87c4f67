//! Good and broken exhibits with the verdict that each must get.
//!
//! [`synth`] builds a good exhibit of 16 MiB in memory, the same bytes on every machine;
//! [`cases`] names what can be done to one and what `verify` must say then. `make-exhibits` writes
//! them out for other implementations.
#![forbid(unsafe_code)]

pub mod cases;
pub mod random;
pub mod synth;
