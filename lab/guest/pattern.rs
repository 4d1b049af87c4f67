//! What a planted page holds. Compiled twice: into the guest's program, which writes it, and into
//! the lab, which knows from a frame number alone what the page at that address must be.

/// Bytes in a page on x86-64.
pub const PAGE: usize = 4096;

/// First eight bytes of every page that carries its own frame number.
pub const MAGIC: [u8; 8] = *b"SFFRAME1";

/// One step of xorshift64*: fast enough to fill gigabytes under TCG. `state` must not be 0.
pub fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// Writes the page for guest frame number `pfn` of run `run`: magic, run, frame number, then bytes
/// drawn from both, so that a page that landed elsewhere or was torn cannot pass for another.
pub fn frame_page(run: u64, pfn: u64, page: &mut [u8; PAGE]) {
    let mut state = (run ^ pfn.rotate_left(32)) | 1;
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&next(&mut state).to_le_bytes());
    }
    page[..8].copy_from_slice(&MAGIC);
    page[8..16].copy_from_slice(&run.to_le_bytes());
    page[16..24].copy_from_slice(&pfn.to_le_bytes());
}
