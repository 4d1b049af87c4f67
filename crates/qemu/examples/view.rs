//! Prints the memory of a running guest as QEMU sees it: `view SOCKET`. Only queries are sent.
#![forbid(unsafe_code)]

use qemu::facts::Facts;
use qemu::{GuestView, Qmp};
use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(5);

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: view SOCKET")?;
    let mut qmp = Qmp::connect_with(
        Path::new(&path),
        Path::new(&path),
        WAIT,
        Some(Box::new(|exchange| {
            if let Some(error) = exchange.error {
                eprintln!("{} {}: {error}", exchange.command, exchange.arguments);
            }
        })),
    )?;
    println!("peer          {:?}", qmp.peer()?);
    let mut facts = Facts::of(&mut qmp, WAIT);
    let version = facts.version()?.qemu;
    println!("version       {}.{}.{}", version.major, version.minor, version.micro);
    println!("name, uuid    {:?} {}", facts.name()?, facts.uuid()?);
    println!("machine       {}", facts.machine_type()?);
    println!("status        {:?} {:?}", facts.status()?, facts.kvm()?);
    println!("confidential  {:?}", facts.confidential()?);
    println!(
        "migration     {:?}, balloon {:?}",
        facts.migration()?,
        qemu::balloon::take(&mut facts)?
    );
    let began = Instant::now();
    let view = GuestView::take(&mut qmp, WAIT)?;
    println!("taken in      {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
    println!("size          {:?}", view.size);
    for device in &view.devices {
        println!("device        {:?} {:?} {:?}", device.device_type, device.id, device.size);
    }
    for shown in &view.regions {
        let region = &shown.region;
        println!(
            "{:016x} {:>12x} {:10} {} {:24} hva {:>12x} block {:?} + {:x} page {:?} owner {}",
            region.gpa,
            region.len,
            region.kind.word(),
            if region.readonly { "ro" } else { "rw" },
            region.name,
            shown.hva.unwrap_or(0),
            region.block.as_deref().unwrap_or("?"),
            region.block_offset,
            shown.block_page_size,
            region.owner.as_deref().unwrap_or("-"),
        );
    }
    println!("imaged        {} bytes", view.map()?.imaged_len());
    Ok(())
}
