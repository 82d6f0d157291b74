/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the reset vector and from a start-up IPI to C, and from an interrupt to C.
 *
 * The ROM is a picture of the 64 KiB at `image` in RAM, where everything is
 * linked to run; see probe.ld.
 */

    .set CODE, 8                /* selectors in the table below */
    .set DATA, 16
    .set CR0_PE_ET, 0x11        /* and, unlike at reset, caches on */
    .set LAPIC_ID, 0xfee00020   /* bits 31 to 24 of this register */
    .set STATE, 0x80008         /* of the mailbox */
    .set ASLEEP, 3              /* PROBE_ASLEEP */
    .set CPUS, 32               /* PROBE_CPUS */
    .set STACK_SIZE_LOG2, 12

    .section .boot, "ax"
    .code16
boot:
    /*
     * CS still has its base of 0xffff0000 from reset: the only way to the ROM
     * in real mode that does not go through the chipset's shadow RAM.
     */
    mov     $image_segment, %ax
    mov     %ax, %es
    xor     %si, %si
    xor     %di, %di
    mov     $0x10000 / 4, %cx
    rep movsl %cs:(%si), %es:(%di)
    ljmp    $image_segment, $0

    .balign 8
gdt:
    .quad   0
    .quad   0x00cf9b000000ffff  /* CODE: flat, 32-bit */
    .quad   0x00cf93000000ffff  /* DATA: flat */
    .globl  gdtr
gdtr:
    .word   . - gdt - 1
    .long   gdt

    /* probe.ld puts these last 16 of 256 bytes at 0xfffffff0. */
    .org    0xf0
    jmp     boot
    .org    0x100

    /* probe.ld puts this at `image`: a start-up IPI can name but the start of a page. */
    .section .startup, "ax"
    .globl  startup
startup:
    lgdtl   %cs:gdtr_offset
    mov     $CR0_PE_ET, %eax
    mov     %eax, %cr0
    ljmpl   $CODE, $start

    .text
    .code32
start:
    mov     $DATA, %eax
    mov     %eax, %ds
    mov     %eax, %es
    mov     %eax, %ss
    /* The stack is the CPU's own: number n, by its APIC ID, which is 0 for the BSP. */
    mov     LAPIC_ID, %ebx
    shr     $24, %ebx
    cmp     $CPUS, %ebx
    jae     too_many
    lea     1(%ebx), %esp
    shl     $STACK_SIZE_LOG2, %esp
    add     $stacks, %esp
    test    %ebx, %ebx
    jnz     1f
    /* RAM holds whatever it did before a system reset, and keeps it if we slept. */
    cmpl    $ASLEEP, STATE
    je      2f
    xor     %eax, %eax
    mov     $bss_start, %edi
    mov     $bss_dwords, %ecx
    rep stosl
    call    probe_main
2:
    call    probe_wake
1:
    push    %ebx
    call    ap_main
too_many:
    hlt
    jmp     too_many

    /*
     * One stub of equal size per vector, so that every vector is told apart
     * and a misrouted interrupt shows as what it is.
     */
    .globl  vector_stubs, vector_stubs_end
    .balign 16
vector_stubs:
    .set    vector, 0
    .rept   256
    /* The CPU itself pushes an error code for #DF, #TS .. #PF, #AC, #CP, ... */
    .if     vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push    $0
    .endif
    push    $vector
    jmp     interrupted
    .balign 16
    .set    vector, vector + 1
    .endr
vector_stubs_end:

interrupted:
    pusha
    push    %esp                /* the struct frame * that interrupt() takes */
    call    interrupt
    add     $4, %esp
    popa
    add     $8, %esp            /* vector and error code */
    iret

    /* Not in .bss: to clear them would be to touch pages that no CPU may ever use. */
    .section .stacks, "aw", @nobits
    .globl  stacks, stacks_end
stacks:
    .skip   CPUS << STACK_SIZE_LOG2
stacks_end:

    .section .note.GNU-stack, "", @progbits
