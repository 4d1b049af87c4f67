#!/usr/bin/env python3
"""Records what tests/graphs.rs reads: the graph and the flat view of machines, each taken together.

    record.py VERSION QEMU [ARGUMENT ...]

VERSION is the directory here; the variable MACHINES may name some of them. QEMU and its arguments (`-L DIR` for its firmware) begin the command line.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

MACHINES = {
    "pc": ["-M", "pc", "-m", "128M", "-vga", "std"],
    # Before the guest's first instruction: no RAM under the firmware is shown yet.
    "pc-reset": ["-M", "pc", "-m", "128M", "-vga", "std", "-S"],
    "q35-both-sides": ["-M", "q35", "-m", "5G", "-vga", "std"],
    "q35-devices": [
        "-M", "q35,nvdimm=on", "-m", "256M,slots=4,maxmem=4G", "-vga", "std", "-device", "virtio-balloon-pci",
        "-object", "memory-backend-ram,id=dimm0,size=128M", "-device", "pc-dimm,id=plugged,memdev=dimm0",
        "-object", "memory-backend-ram,id=nv0,size=128M", "-device", "nvdimm,id=persistent,memdev=nv0",
        "-object", "memory-backend-ram,id=vm0,size=256M",
        "-device", "virtio-mem-pci,id=grows,memdev=vm0,requested-size=64M",
    ],
    "q35-numa": [
        "-M", "q35", "-m", "256M", "-smp", "2", "-vga", "none",
        "-object", "memory-backend-ram,id=n0,size=128M", "-object", "memory-backend-ram,id=n1,size=128M",
        "-numa", "node,nodeid=0,memdev=n0,cpus=0", "-numa", "node,nodeid=1,memdev=n1,cpus=1",
    ],
    # What lies behind a bridge has a name of its own kind, and not of its own.
    "q35-ports": [
        "-M", "q35", "-m", "128M", "-device", "pcie-root-port,id=a,slot=1", "-device", "pcie-root-port,id=b,slot=2",
        "-device", "pcie-root-port,id=c,slot=3", "-device", "bochs-display,bus=a", "-device", "bochs-display,bus=b",
    ],
    "pc-bridges": [
        "-M", "pc", "-m", "128M", "-device", "pci-bridge,id=a,chassis_nr=1", "-device", "pci-bridge,id=b,chassis_nr=2",
        "-device", "secondary-vga,bus=a,addr=1", "-device", "secondary-vga,bus=b,addr=1",
    ],
    "microvm": ["-M", "microvm", "-m", "128M"],
}


def record(command, to):
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "qmp")
        qemu = subprocess.Popen(
            command + ["-nodefaults", "-no-user-config", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
        )
        try:
            # The firmware sets up what the chipset shows.
            time.sleep(4)
            wire = socket.socket(socket.AF_UNIX)
            wire.connect(path)
            lines = wire.makefile("rw")

            def ask(name, **arguments):
                lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                lines.flush()
                while True:
                    answer = json.loads(lines.readline())
                    if "return" in answer or "error" in answer:
                        return answer["return"]

            lines.readline()
            ask("qmp_capabilities")
            os.makedirs(to, exist_ok=True)
            for name, hmp in [("graph", "info mtree -o -D"), ("flat", "info mtree -f -o")]:
                text = ask("human-monitor-command", **{"command-line": hmp})
                with open(os.path.join(to, f"{name}.txt"), "w", newline="") as out:
                    out.write(text.replace("\r\n", "\n"))
        finally:
            qemu.kill()
            qemu.wait()


def main():
    version, qemu = sys.argv[1], sys.argv[2:]
    here = os.path.dirname(os.path.abspath(__file__))
    wanted = os.environ.get("MACHINES", " ".join(MACHINES)).split()
    for machine, arguments in ((machine, MACHINES[machine]) for machine in wanted):
        record(qemu + arguments, os.path.join(here, version, machine))


main()
