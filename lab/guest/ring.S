# The ring guest: a boot sector that stores k, k + 1, k + 2, ... for ever, each into the next word
# of a ring of pages. What an image holds of them says whether it shows one instant (src/tear.rs).
#
# No kernel: nobody moves a page or comes between two stores. The parameters lie at PARAMETERS and
# are patched in by src/ring.rs, which has the same layout.

        .set    SECTOR, 0x7c00
        # Before the partition table's place, where firmware and QEMU would look for a geometry.
        .set    PARAMETERS, 0x190
        .set    MIB, 0x100000
        .set    COM1, 0x3f8

        # Some ten times a second the guest does something that its hypervisor has to do for it. In the outer
        # guest, whose CPUs are translated, QEMU 10.0 was found (by a debugger) to run this guest with the
        # global interrupt flag off, which VMRUN sets: the host's interrupts wait until the guest leaves by
        # itself, and a ring that only stores never does. Seldom: the way out and in again loses what the
        # CPU remembers of page tables, and takes milliseconds there.
        .set    LEAVES, 0x400000

        .code16
        .globl  start
start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              # A20, should the firmware have left it off
        orb     $2, %al
        outb    %al, $0x92
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        andl    $0x9ffffff3, %eax       # caches on; no trap at an MMX instruction
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $SECTOR, %esp
        cld

        # Every page of RAM from 1 MiB on gets content of its own: a copy has to carry it all.
        movl    $MIB, %edi
fill:   movl    %edi, (%edi)
        addl    $4, %edi
        cmpl    fill_to, %edi
        jb      fill

        # The ring's pages say what they are.
        movl    base, %edi
        xorl    %edx, %edx              # the page's index
header: pushl   %edi
        movl    $inverted_magic, %esi
        movl    $4, %ecx
turn:   lodsl                           # so this sector does not hold the magic itself
        notl    %eax
        stosl
        loop    turn
        movl    $run, %esi
        movsl
        movsl
        movl    %edx, %eax
        stosl
        movl    pages, %eax
        stosl
        popl    %eax
        movl    %eax, %ebx
        shrl    $12, %eax
        stosl
        xorl    %eax, %eax
        stosl
        movl    %ebx, %edi
        addl    stride, %edi
        incl    %edx
        cmpl    pages, %edx
        jb      header

        # The first number is L, the count of words: so no word ever holds 0.
        movl    pages, %eax
        leal    (%eax,%eax,2), %eax
        movd    %eax, %mm0
        movl    $1, %eax
        movd    %eax, %mm1
        call    lap

        movl    $ready, %esi
say:    movw    $COM1 + 5, %dx
wait:   inb     %dx, %al
        testb   $0x20, %al              # the transmitter is empty
        jz      wait
        lodsb
        testb   %al, %al
        jz      said
        movw    $COM1, %dx
        outb    %al, %dx
        jmp     say

said:   cmpl    $0, halts
        jne     halt
leave:  xorl    %eax, %eax
        cpuid                           # every hypervisor answers it itself
        movl    $LEAVES, %esi
for_ever:
        call    lap
        subl    pages, %esi
        subl    $62, %esi               # a lap has its own price
        jg      for_ever
        jmp     leave

halt:   hlt                             # for ever: interrupts are off
        jmp     halt

        # Once round the ring. Each movq is one aligned store of 64 bits.
lap:    movl    base, %edi
        movl    pages, %edx
page:   movq    %mm0, 0x080(%edi)
        paddq   %mm1, %mm0
        movq    %mm0, 0x7f8(%edi)
        paddq   %mm1, %mm0
        movq    %mm0, 0xff8(%edi)
        paddq   %mm1, %mm0
        movl    delay, %ecx
        jecxz   next
        subl    $4096, %esi             # a slow page too
idle:   loop    idle
next:   addl    stride, %edi
        decl    %edx
        jnz     page
        ret

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      # code: all of 4 GiB
        .quad   0x00cf92000000ffff      # data: all of 4 GiB
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

inverted_magic:
        .long   ~0x6c697473, ~0x6172666c, ~0x7220656d, ~0x21676e69     # "stillframe ring!"
        # As every guest of the lab says it (src/serial.rs).
ready:  .asciz  "stillframe-guest-ready\n"

        .org    PARAMETERS
run:    .quad   0
base:   .long   0
stride: .long   0
pages:  .long   0
delay:  .long   0
fill_to:
        .long   0
halts:  .long   0

        .org    510
        .word   0xaa55
