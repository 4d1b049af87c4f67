//! The notes: the registers of each CPU, and what the guest gave.

use super::{DumpError, GuestNote, Machine, Vcpu, malformed};
use evidence::format::elf::{RawNote, first_note};
use std::collections::BTreeSet;

const NT_PRSTATUS: u32 = 1;
const NT_PRFPREG: u32 = 2;
const NT_ARM_SVE: u32 = 0x405;

/// Lengths of the notes' contents (`target/i386/arch_dump.c`, `target/arm/arch_dump.c`).
mod len {
    pub(super) const PRSTATUS_I386: usize = 144;
    pub(super) const PRSTATUS_X86_64: usize = 336;
    pub(super) const PRSTATUS_AARCH64: usize = 392;
    pub(super) const PRFPREG_AARCH64: usize = 528;
    pub(super) const STATE: usize = 440;
    /// Before QEMU 2.11: without `kernel_gs_base`.
    pub(super) const OLD_STATE: usize = 432;
}

/// CR4.LA57.
const LA57: u64 = 1 << 12;

/// The registers of one CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registers {
    /// x86, in any mode.
    X86(Box<X86>),
    /// 64-bit ARM.
    Aarch64(Box<Aarch64>),
}

/// A segment register, as QEMU keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentRegister {
    /// The selector; 0 of GDT and IDT.
    pub selector: u32,
    /// The limit in bytes.
    pub limit: u32,
    /// The second word of the descriptor, with its type in bits 8 to 23.
    pub flags: u32,
    /// The base: a linear address.
    pub base: u64,
}

/// What QEMU's own note tells of an x86 CPU. EFER, CR8, the debug registers, the other MSRs and the FPU
/// are in no note.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "their names say it")]
pub struct X86 {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: SegmentRegister,
    pub ds: SegmentRegister,
    pub es: SegmentRegister,
    pub fs: SegmentRegister,
    pub gs: SegmentRegister,
    pub ss: SegmentRegister,
    pub ldt: SegmentRegister,
    pub tr: SegmentRegister,
    pub gdt: SegmentRegister,
    pub idt: SegmentRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// `None` of a QEMU that does not write it.
    pub kernel_gs_base: Option<u64>,
}

impl X86 {
    /// Whether the page tables have five levels (CR4.LA57).
    pub fn la57(&self) -> bool {
        self.cr4 & LA57 != 0
    }
}

/// What the notes tell of an ARM CPU. TTBR0_EL1, TTBR1_EL1 and the other system registers are in no
/// note; SVE's are in [`super::Head::notes`] only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aarch64 {
    /// X0 to X30.
    pub x: [u64; 31],
    /// The stack pointer; 0 of a CPU in AArch32 state.
    pub sp: u64,
    /// The program counter.
    pub pc: u64,
    /// PSTATE, or CPSR in AArch32 state.
    pub pstate: u64,
    /// V0 to V31.
    pub v: [u128; 32],
    /// The floating-point status register.
    pub fpsr: u32,
    /// The floating-point control register.
    pub fpcr: u32,
}

/// Notes one after the other, with the place of the next.
struct Notes<'a> {
    rest: &'a [u8],
    at: u64,
}

impl<'a> Notes<'a> {
    /// The next note, which is not gone past; `None` behind the last.
    fn peek(&self) -> Result<Option<(RawNote<'a>, &'a [u8])>, DumpError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let cut_short = || malformed(self.at, "a whole note", &format!("{:x?}", self.head()));
        first_note(self.rest).map(Some).ok_or_else(cut_short)
    }

    fn head(&self) -> &[u8] {
        self.rest.get(..12).unwrap_or(self.rest)
    }

    fn go_to(&mut self, rest: &'a [u8]) {
        self.at += (self.rest.len() - rest.len()) as u64;
        self.rest = rest;
    }

    /// The content of the next note, when it is of this name, kind and one of these lengths.
    fn take(
        &mut self,
        name: &[u8],
        kind: u32,
        lens: &[usize],
    ) -> Result<Option<&'a [u8]>, DumpError> {
        match self.peek()? {
            Some((note, rest)) if is(&note, name, kind) && lens.contains(&note.desc.len()) => {
                self.go_to(rest);
                Ok(Some(note.desc))
            }
            _ => Ok(None),
        }
    }

    /// What stands where a note of QEMU's should.
    fn missing(&self, wanted: &'static str) -> DumpError {
        malformed(self.at, wanted, &format!("{:x?}", self.head()))
    }
}

fn is(note: &RawNote<'_>, name: &[u8], kind: u32) -> bool {
    note.name.strip_suffix(b"\0") == Some(name) && note.kind == kind
}

/// Takes the notes of a dump apart. They begin at byte `at` of the stream.
///
/// QEMU copies the guest's own note behind its own, whatever it says: it may call itself one of QEMU's.
/// Which notes are QEMU's is told by their order, not by their names.
pub(super) fn parse(
    machine: Machine,
    bytes: &[u8],
    at: u64,
) -> Result<(Vec<Vcpu>, Option<GuestNote>), DumpError> {
    let mut notes = Notes { rest: bytes, at };
    let cpus = match machine {
        Machine::I386 => x86(&mut notes, len::PRSTATUS_I386)?,
        Machine::X86_64 => x86(&mut notes, len::PRSTATUS_X86_64)?,
        Machine::Aarch64 => aarch64(&mut notes)?,
    };
    let mut seen = BTreeSet::new();
    if let Some(twice) = cpus.iter().find(|cpu| !seen.insert(cpu.index)) {
        return Err(malformed(at, "each CPU once", &format!("CPU {} twice", twice.index)));
    }
    let guest = notes.peek()?.map(|(RawNote { name, kind, desc }, rest)| {
        notes.go_to(rest);
        GuestNote { name: name.into(), kind, desc: desc.into() }
    });
    match notes.rest {
        [] => Ok((cpus, guest)),
        _ => Err(notes.missing("no note behind the guest's own")),
    }
}

/// All NT_PRSTATUS, then as many notes of QEMU's own.
fn x86(notes: &mut Notes<'_>, prstatus_len: usize) -> Result<Vec<Vcpu>, DumpError> {
    let mut statuses = Vec::new();
    while let Some(desc) = notes.take(b"CORE", NT_PRSTATUS, &[prstatus_len])? {
        statuses.push((notes.at, desc));
    }
    let mut cpus = Vec::new();
    for (at, status) in statuses {
        const WANTED: &str = "QEMU's own note of a CPU";
        let at_state = notes.at;
        let state = notes.take(b"QEMU", 0, &[len::STATE, len::OLD_STATE])?;
        let state = state.ok_or_else(|| notes.missing(WANTED))?;
        let state = Words(state).state().ok_or_else(|| {
            let head = state.get(..8).unwrap_or_default();
            malformed(at_state, "version 1 of QEMU's own note, and its size", &format!("{head:x?}"))
        })?;
        let pid = match prstatus_len {
            len::PRSTATUS_I386 => Words(status).prstatus_i386(&state),
            _ => Words(status).prstatus_x86_64(&state),
        };
        // QEMU fills both from the same fields: if they differ they are not of one CPU.
        let pid = pid.ok_or_else(|| {
            malformed(at, "NT_PRSTATUS that agrees with QEMU's own note", "other registers")
        })?;
        cpus.push(Vcpu { index: index(at, pid)?, registers: Registers::X86(Box::new(state)) });
    }
    Ok(cpus)
}

/// CPU by CPU: NT_PRSTATUS, NT_PRFPREG, and NT_ARM_SVE where there is SVE.
fn aarch64(notes: &mut Notes<'_>) -> Result<Vec<Vcpu>, DumpError> {
    let mut cpus = Vec::new();
    loop {
        // Without a second note of the CPU the first one is none of QEMU's.
        let (at, before) = (notes.at, notes.rest);
        let status = notes.take(b"CORE", NT_PRSTATUS, &[len::PRSTATUS_AARCH64])?;
        let float = notes.take(b"CORE", NT_PRFPREG, &[len::PRFPREG_AARCH64])?;
        let (Some(status), Some(float)) = (status, float) else {
            (notes.at, notes.rest) = (at, before);
            return Ok(cpus);
        };
        if let Some((sve, rest)) = notes.peek()?
            && is(&sve, b"LINUX", NT_ARM_SVE)
        {
            notes.go_to(rest);
        }
        let cpu = Words(status).prstatus_aarch64().zip(Words(float).prfpreg_aarch64());
        let Some(((pid, mut registers), (v, fpsr, fpcr))) = cpu else {
            return Err(malformed(at, "the registers of a CPU", "less"));
        };
        (registers.v, registers.fpsr, registers.fpcr) = (v, fpsr, fpcr);
        let registers = Registers::Aarch64(Box::new(registers));
        cpus.push(Vcpu { index: index(at, pid)?, registers });
    }
}

/// QEMU's `cpu_index`, which `pr_pid` is one more than.
fn index(at: u64, pid: u32) -> Result<u32, DumpError> {
    pid.checked_sub(1).ok_or_else(|| malformed(at, "a CPU's number in pr_pid", "0"))
}

/// Little-endian words one after the other; `None` behind the last.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn segment_register(&mut self) -> Option<SegmentRegister> {
        let (selector, limit, flags, _pad) = (self.u32()?, self.u32()?, self.u32()?, self.u32()?);
        Some(SegmentRegister { selector, limit, flags, base: self.u64()? })
    }

    /// `QEMUCPUState`, version 1.
    fn state(mut self) -> Option<X86> {
        let len = self.0.len();
        let (version, size) = (self.u32()?, self.u32()?);
        if version != 1 || usize::try_from(size) != Ok(len) {
            return None;
        }
        let mut state = X86 {
            rax: self.u64()?,
            rbx: self.u64()?,
            rcx: self.u64()?,
            rdx: self.u64()?,
            rsi: self.u64()?,
            rdi: self.u64()?,
            rsp: self.u64()?,
            rbp: self.u64()?,
            r8: self.u64()?,
            r9: self.u64()?,
            r10: self.u64()?,
            r11: self.u64()?,
            r12: self.u64()?,
            r13: self.u64()?,
            r14: self.u64()?,
            r15: self.u64()?,
            rip: self.u64()?,
            rflags: self.u64()?,
            cs: self.segment_register()?,
            ds: self.segment_register()?,
            es: self.segment_register()?,
            fs: self.segment_register()?,
            gs: self.segment_register()?,
            ss: self.segment_register()?,
            ldt: self.segment_register()?,
            tr: self.segment_register()?,
            gdt: self.segment_register()?,
            idt: self.segment_register()?,
            cr0: self.u64()?,
            ..X86::default()
        };
        let _cr1 = self.u64()?;
        (state.cr2, state.cr3, state.cr4) = (self.u64()?, self.u64()?, self.u64()?);
        state.kernel_gs_base = self.u64();
        Some(state)
    }

    /// `x86_64_elf_prstatus`: `pr_pid`, when the rest is what `s` says.
    fn prstatus_x86_64(mut self, s: &X86) -> Option<u32> {
        self.bytes::<32>()?;
        let pid = self.u32()?;
        self.bytes::<76>()?;
        let mut found = [0; 27];
        for word in &mut found {
            *word = self.u64()?;
        }
        let (fs, gs) = (s.fs.base, s.gs.base);
        let selector = |register: SegmentRegister| u64::from(register.selector);
        let [cs, ss, ds, es] = [s.cs, s.ss, s.ds, s.es].map(selector);
        let same = [
            [s.r15, s.r14, s.r13, s.r12, s.rbp, s.rbx, s.r11, s.r10, s.r9],
            // 0: orig_rax, which a CPU has not.
            [s.r8, s.rax, s.rcx, s.rdx, s.rsi, s.rdi, 0, s.rip, cs],
            [s.rflags, s.rsp, ss, fs, gs, ds, es, selector(s.fs), selector(s.gs)],
        ];
        (same.as_flattened() == found).then_some(pid)
    }

    /// `x86_elf_prstatus`: as [`Self::prstatus_x86_64`], with the low halves.
    fn prstatus_i386(mut self, s: &X86) -> Option<u32> {
        self.bytes::<24>()?;
        let pid = self.u32()?;
        self.bytes::<44>()?;
        let mut found = [0; 17];
        for word in &mut found {
            *word = u64::from(self.u32()?);
        }
        let selector = |register: SegmentRegister| u64::from(register.selector & 0xffff);
        let [cs, ss, ds, es, fs, gs] = [s.cs, s.ss, s.ds, s.es, s.fs, s.gs].map(selector);
        let [rbx, rcx, rdx, rsi, rdi, rbp, rax, rip, rflags, rsp] =
            [s.rbx, s.rcx, s.rdx, s.rsi, s.rdi, s.rbp, s.rax, s.rip, s.rflags, s.rsp]
                .map(|word| word & 0xffff_ffff);
        let same = [rbx, rcx, rdx, rsi, rdi, rbp, rax, ds, es, fs, gs, 0, rip, cs, rflags, rsp, ss];
        (same == found).then_some(pid)
    }

    /// `aarch64_elf_prstatus`: `pr_pid` and the general registers.
    fn prstatus_aarch64(mut self) -> Option<(u32, Aarch64)> {
        self.bytes::<32>()?;
        let pid = self.u32()?;
        self.bytes::<76>()?;
        let mut registers = Aarch64::default();
        for x in &mut registers.x {
            *x = self.u64()?;
        }
        (registers.sp, registers.pc) = (self.u64()?, self.u64()?);
        registers.pstate = self.u64()?;
        Some((pid, registers))
    }

    /// `aarch64_user_vfp_state`.
    fn prfpreg_aarch64(mut self) -> Option<([u128; 32], u32, u32)> {
        let mut v = [0; 32];
        for register in &mut v {
            *register = u128::from_le_bytes(self.bytes()?);
        }
        Some((v, self.u32()?, self.u32()?))
    }
}
