/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The contract between the probe guest and the harness that drives it.
 *
 * The guest's RAM is a file which the harness also has open.  At guest
 * physical PROBE_MAILBOX lies a struct probe_mailbox, little endian, every
 * field naturally aligned.  The guest clears it when it starts, all but boots
 * and what log_count and cpus do not cover, so the harness may write nothing
 * before it has seen PROBE_READY.  It keeps it when it is woken up.
 *
 * The first CPU, the one with APIC ID 0, carries out what the harness asks for.
 * The others, if there are any, only take interrupts, and are all up when
 * PROBE_READY is there.  Each APIC ID must be below PROBE_CPUS; with one that is
 * not, the guest never gets ready.
 *
 * To have a batch of operations carried out, the harness writes ops[] and
 * count, and then, last, done + 1 into request.  The guest ignores every other
 * value: pwrite() of a few bytes may well store them one by one, and half of a
 * sequence number must not make it carry out a batch twice.
 *
 * The guest carries out the operations in order, writes what they read into
 * their value, then result, and then, last, copies request into done.
 * Interrupts are taken in between the operations.  A batch ends at the first
 * operation that is refused; those before it have happened, it and those after
 * it have not.  Refused are an unknown op, a width other than 1, 2 or 4, an
 * address which the operation cannot reach, and what is said at the operation.
 * A batch longer than PROBE_OPS is refused whole, with the result PROBE_OPS + 1.
 *
 * The guest stores every field in one piece, but a read() by the harness may
 * be in pieces too.  Fields that change by themselves are best read natively
 * through a mapping.
 *
 * An interrupt is in the log before counters[] and taken[] count it.
 *
 * These and the log may be overwritten by the harness only while nothing can
 * interrupt the guest but its timer (and then not counters[PROBE_TIMER]).
 */
#ifndef PROBE_ABI_H
#define PROBE_ABI_H

#include <stddef.h>
#include <stdint.h>

#define PROBE_MAILBOX   0x80000
#define PROBE_MAGIC     0x52504356      /* the bytes "VCPR" */
#define PROBE_VERSION   7

#define PROBE_VECTORS   256
#define PROBE_OPS       384
#define PROBE_LOG       4096
#define PROBE_CPUS      32

/* The first CPU's timer, and its call to the others: counted, but never logged. */
#define PROBE_TIMER     0xef
#define PROBE_SPURIOUS  0xff            /* counted and logged, but gets no EOI */

enum probe_state {
    PROBE_STARTING = 0,
    PROBE_READY = 1,
    /* An exception.  Its CPU has stopped for good, and so has the first one. */
    PROBE_FAULTED = 2,
    /* By PROBE_SLEEP, and until all CPUs are up again. */
    PROBE_ASLEEP = 3,
};

enum probe_opcode {
    /* address = bus << 16 | device << 11 | function << 8 | offset, aligned */
    PROBE_CFG_READ = 1,
    PROBE_CFG_WRITE = 2,
    /* address = physical, below 4 GiB */
    PROBE_MMIO_READ = 3,
    PROBE_MMIO_WRITE = 4,
    /* address = port */
    PROBE_PORT_IN = 5,
    PROBE_PORT_OUT = 6,
    /* address = index; 64-bit value; width is ignored */
    PROBE_MSR_READ = 7,
    PROBE_MSR_WRITE = 8,
    /* value = 0: the first CPU runs with IF clear from now on, 1: with IF set */
    PROBE_INTERRUPTS = 9,
    PROBE_NOP = 10,
    /*
     * All CPUs are in x2APIC mode from now on, until a reset.  Refused if the CPU
     * has no such mode.  An MSR write is not the way to it: the guest must know.
     */
    PROBE_X2APIC = 11,
    /*
     * Each CPU in xAPIC mode has the logical ID 1 << APIC ID from now on, in the
     * flat model.  In x2APIC mode a CPU always has one; then nothing is done.
     */
    PROBE_LOGICAL = 12,
    /*
     * address = physical, below 4 GiB, aligned; value = IDT vector << 32 | data.
     * Whoever takes the vector from now on first writes the 32 bits of data to
     * address, so that a device takes its interrupt back before it is counted and
     * gets its EOI.  address = 0: nothing is written from now on.  Refused for an
     * exception.  Each vector has its own.
     */
    PROBE_ACKNOWLEDGE = 13,
    /*
     * address = port of a chipset, value = what puts the machine to sleep there.
     * The batch ends with it, and is answered when the guest has been woken up: by
     * a reset which finds PROBE_ASLEEP and what else is in RAM as it was.  After
     * that CPUs are as after any reset, and mailbox and acknowledgements as before.
     */
    PROBE_SLEEP = 14,
};

struct probe_op {
    uint32_t op;                /* enum probe_opcode */
    uint32_t width;             /* bytes: 1, 2 or 4 */
    uint64_t address;
    uint64_t value;             /* to write, or what was read, zero-extended */
    uint64_t reserved;
};

/* Complete before log_count covers it. */
struct probe_delivery {
    uint64_t tsc;
    uint16_t vector;
    uint16_t cpu;               /* APIC ID of who took it */
    uint32_t sequence;          /* log_count before this entry */
};

struct probe_mailbox {
    uint32_t magic;             /* 0x000 */
    uint32_t version;           /* 0x004 */
    uint32_t state;             /* 0x008: enum probe_state */
    uint32_t fault_vector;      /* 0x00c: these four are valid once the state */
    uint32_t fault_error;       /* 0x010: is PROBE_FAULTED; 0 if there is no code */
    uint32_t fault_eip;         /* 0x014 */
    uint32_t fault_cr2;         /* 0x018 */
    uint32_t boots;             /* 0x01c: how often it has started in this RAM, 0 at first */
    uint64_t loops;             /* 0x020: passes of the main loop */
    uint64_t tsc;               /* 0x028: at the last of them */
    uint32_t request;           /* 0x030: written last by the harness: done + 1 */
    uint32_t done;              /* 0x034: written last by the guest */
    uint32_t count;             /* 0x038: operations in this request */
    uint32_t result;            /* 0x03c: 0, or 1 + index of the refused one */
    uint32_t log_count;         /* 0x040: entries ever written */
    uint32_t cpus;              /* 0x044: that are up */
    /*
     * 0x048: written by the harness: the IDT vector that stays in service, without
     * its EOI, while this stands here.  The CPU that has taken and counted it takes
     * others that are of higher priority, and does nothing else.  0: none.
     */
    uint32_t held;
    uint32_t reserved_04c[237];
    uint32_t counters[PROBE_VECTORS];           /* 0x0400: taken by all CPUs, per IDT vector */
    uint32_t reserved_800[512];
    struct probe_op ops[PROBE_OPS];             /* 0x1000 */
    struct probe_delivery log[PROBE_LOG];       /* 0x4000: entry n is in n % PROBE_LOG */
    uint32_t taken[PROBE_CPUS][PROBE_VECTORS];  /* 0x14000: by each CPU, per IDT vector */
};

_Static_assert(offsetof(struct probe_mailbox, loops) == 0x020, "loops");
_Static_assert(offsetof(struct probe_mailbox, request) == 0x030, "request");
_Static_assert(offsetof(struct probe_mailbox, log_count) == 0x040, "log_count");
_Static_assert(offsetof(struct probe_mailbox, cpus) == 0x044, "cpus");
_Static_assert(offsetof(struct probe_mailbox, held) == 0x048, "held");
_Static_assert(sizeof(struct probe_delivery) == 16, "delivery");
_Static_assert(offsetof(struct probe_mailbox, counters) == 0x400, "counters");
_Static_assert(offsetof(struct probe_mailbox, ops) == 0x1000, "ops");
_Static_assert(offsetof(struct probe_mailbox, log) == 0x4000, "log");
_Static_assert(offsetof(struct probe_mailbox, taken) == 0x14000, "taken");
_Static_assert(sizeof(struct probe_mailbox) == 0x1c000, "mailbox");

#endif
