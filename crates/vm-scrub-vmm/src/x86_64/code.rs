//! The guest's own code, assembled with this crate and copied into the firmware.
//!
//! All jumps are relative, so it runs wherever it is copied to. On entry:
//!
//! | register | meaning |
//! |---|---|
//! | `rax` | the word to write or to look for |
//! | `rbx`, `rdx` | begin and end of the table of ranges in the mailbox: address, number of 8-byte words |
//! | `r8` | address of the counter of passes in the mailbox |
//!
//! At the end it writes to [`DONE_PORT`], with its answer in `r12` to `r15` (see [`Answer`](crate::vcpu::Answer)).
//! It uses no stack and no vector registers, so that nothing but general registers has to be set up.

use std::arch::global_asm;
use std::slice;

use crate::vcpu::{DONE_PORT, Program};

global_asm!(
    ".pushsection .rodata.vm_scrub_guest, \"a\", @progbits",
    ".balign 64",
    ".globl vm_scrub_guest_begin, vm_scrub_guest_fill, vm_scrub_guest_fill_forever",
    ".globl vm_scrub_guest_scan, vm_scrub_guest_count, vm_scrub_guest_spin, vm_scrub_guest_end",
    ".hidden vm_scrub_guest_begin, vm_scrub_guest_fill, vm_scrub_guest_fill_forever",
    ".hidden vm_scrub_guest_scan, vm_scrub_guest_count, vm_scrub_guest_spin, vm_scrub_guest_end",
    "vm_scrub_guest_begin:",

    // Fill every range once.
    "vm_scrub_guest_fill:",
    "2:  cmp  rbx, rdx",
    "    jae  3f",
    "    mov  rdi, [rbx]",
    "    mov  rcx, [rbx + 8]",
    "    add  rbx, 16",
    "    rep  stosq",
    "    jmp  2b",
    "3:  out  {done}, al",
    "    jmp  3b",

    // Fill every range over and over, and count the passes. Never exits.
    "vm_scrub_guest_fill_forever:",
    "    mov  rsi, rbx",
    "2:  mov  rbx, rsi",
    "3:  mov  rdi, [rbx]",
    "    mov  rcx, [rbx + 8]",
    "    add  rbx, 16",
    "    rep  stosq",
    "    cmp  rbx, rdx",
    "    jb   3b",
    "    inc  qword ptr [r8]",
    "    jmp  2b",

    // Read every range: r12 bytes read, r13 bytes that are not zero, r14 and r15 address and value of the first word
    // that is not zero (valid if r13 is not zero).
    "vm_scrub_guest_scan:",
    "    xor  r12d, r12d",
    "    xor  r13d, r13d",
    "    movabs r9,  0x7f7f7f7f7f7f7f7f",
    "    movabs r10, 0x8080808080808080",
    "    movabs r11, 0x0101010101010101",
    "2:  cmp  rbx, rdx",                    // the next range
    "    jae  9f",
    "    mov  rsi, [rbx]",
    "    mov  rcx, [rbx + 8]",
    "    add  rbx, 16",
    "    sub  r12, rsi",
    "3:  cmp  rcx, 8",                      // the next 64 bytes at once
    "    jb   5f",
    "    mov  rax, [rsi]",
    "    or   rax, [rsi + 8]",
    "    or   rax, [rsi + 16]",
    "    or   rax, [rsi + 24]",
    "    or   rax, [rsi + 32]",
    "    or   rax, [rsi + 40]",
    "    or   rax, [rsi + 48]",
    "    or   rax, [rsi + 56]",
    "    jnz  4f",
    "    add  rsi, 64",
    "    sub  rcx, 8",
    "    jmp  3b",
    "4:  mov  ebp, 8",                      // not all zero: word by word
    "    jmp  6f",
    "5:  mov  ebp, ecx",                    // fewer than 8 words are left, perhaps none
    "    test ecx, ecx",
    "    jz   8f",
    "6:  mov  rax, [rsi]",
    "    add  rsi, 8",
    "    dec  rcx",
    "    test rax, rax",
    "    jz   7f",
    "    test r13, r13",
    "    cmovz r15, rax",
    "    lea  rdi, [rsi - 8]",
    "    cmovz r14, rdi",
    // The top bit of each byte becomes 1 if the byte is not zero; a multiplication adds the eight bits up.
    "    mov  rdi, rax",
    "    and  rdi, r9",
    "    add  rdi, r9",
    "    or   rdi, rax",
    "    and  rdi, r10",
    "    shr  rdi, 7",
    "    imul rdi, r11",
    "    shr  rdi, 56",
    "    add  r13, rdi",
    "7:  dec  ebp",
    "    jnz  6b",
    "    jmp  3b",
    "8:  add  r12, rsi",                    // the end of this range
    "    jmp  2b",
    "9:  out  {done}, al",
    "    jmp  9b",

    // Read every range: r12 bytes read, r13 words equal to rax.
    "vm_scrub_guest_count:",
    "    xor  r12d, r12d",
    "    xor  r13d, r13d",
    "    xor  r9d, r9d",
    "2:  cmp  rbx, rdx",
    "    jae  5f",
    "    mov  rsi, [rbx]",
    "    mov  rcx, [rbx + 8]",
    "    add  rbx, 16",
    "    sub  r12, rsi",
    "3:  test rcx, rcx",
    "    jz   4f",
    "    cmp  [rsi], rax",
    "    sete r9b",
    "    add  r13, r9",
    "    add  rsi, 8",
    "    dec  rcx",
    "    jmp  3b",
    "4:  add  r12, rsi",
    "    jmp  2b",
    "5:  out  {done}, al",
    "    jmp  5b",

    // Touch no memory and never exit.
    "vm_scrub_guest_spin:",
    "2:  pause",
    "    jmp  2b",

    "vm_scrub_guest_end:",
    ".popsection",
    done = const DONE_PORT,
);

// SAFETY: these are the labels above, of one section of constant bytes. Only their addresses are used.
unsafe extern "C" {
    static vm_scrub_guest_begin: u8;
    static vm_scrub_guest_fill: u8;
    static vm_scrub_guest_fill_forever: u8;
    static vm_scrub_guest_scan: u8;
    static vm_scrub_guest_count: u8;
    static vm_scrub_guest_spin: u8;
    static vm_scrub_guest_end: u8;
}

/// The guest's code, to be copied to where the guest runs it.
pub(crate) fn code() -> &'static [u8] {
    let begin = &raw const vm_scrub_guest_begin;
    let bytes = (&raw const vm_scrub_guest_end).addr() - begin.addr();
    // SAFETY: both labels are in one block of one section, the end after the beginning; the bytes between are constant
    // and initialised, and stay where they are as long as the program runs.
    unsafe { slice::from_raw_parts(begin, bytes) }
}

/// Where `program` begins, in bytes from the beginning of the code.
pub(super) fn entry(program: Program) -> u64 {
    let label = match program {
        Program::Fill => &raw const vm_scrub_guest_fill,
        Program::FillForever => &raw const vm_scrub_guest_fill_forever,
        Program::Scan => &raw const vm_scrub_guest_scan,
        Program::Count => &raw const vm_scrub_guest_count,
        Program::Spin => &raw const vm_scrub_guest_spin,
    };
    (label.addr() - (&raw const vm_scrub_guest_begin).addr()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page_and_holds_every_entry() {
        let bytes = code().len();
        assert!(bytes > 0 && bytes <= 4096, "{bytes}");
        let programs = [
            Program::FillForever,
            Program::Scan,
            Program::Count,
            Program::Spin,
        ];
        let mut last = entry(Program::Fill);
        for program in programs {
            assert!(entry(program) > last && entry(program) < bytes as u64);
            last = entry(program);
        }
    }
}
