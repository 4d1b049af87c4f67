//! The methods. Those that read QEMU's process are one loop with settings: `process`.

pub mod process;
