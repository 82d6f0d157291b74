/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A hand on the bus: a guest without a driver, which carries out the accesses
 * it finds in its mailbox and keeps a record of the interrupts it takes.
 */
#include <stdbool.h>

#include "abi.h"

#define PIC_MASTER_MASK     0x21
#define PIC_SLAVE_MASK      0xa1

#define PCI_CONFIG_ADDRESS  0xcf8
#define PCI_CONFIG_DATA     0xcfc
#define PCI_CONFIG_ENABLE   0x80000000

#define LAPIC               0xfee00000
#define LAPIC_EOI           0x0b0
#define LAPIC_LDR           0x0d0
#define LAPIC_DFR           0x0e0
#define LAPIC_SVR           0x0f0
#define LAPIC_ICR           0x300
#define LAPIC_LVT_TIMER     0x320
#define LAPIC_LVT_LINT0     0x350
#define LAPIC_LVT_LINT1     0x360
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_DIVIDE  0x3e0
#define LAPIC_DFR_FLAT      0xffffffff
#define LAPIC_SVR_ENABLE    0x100
#define LAPIC_ICR_OTHERS    0xc4000     /* shorthand "all but self", assert */
#define LAPIC_ICR_INIT      0x500
#define LAPIC_ICR_STARTUP   0x600
#define LAPIC_LVT_MASKED    0x10000
#define LAPIC_LVT_PERIODIC  0x20000
#define LAPIC_DIVIDE_BY_1   0xb

#define X2APIC_MSRS         0x800       /* of the registers, which are 16 bytes apart */
#define APIC_BASE_MSR       0x1b
#define APIC_BASE_X2APIC    0x400
#define CPUID_1_ECX_X2APIC  0x200000

#define FW_CFG_SELECTOR     0x510
#define FW_CFG_DATA         0x511
#define FW_CFG_CPUS         5

#define TICK_BUSY           1000000     /* 1 ms: both KVM's and TCG's bus is 1 GHz */
#define TICK_IDLE           40000000    /* a tick costs a lot where QEMU runs nested */
#define HOT_CYCLES          500000      /* of the TSC, 1 to 5 GHz: 100 to 500 us */
#define BUSY_CYCLES         100000000   /* 20 to 100 ms */

#define EXCEPTIONS          32
#define CODE_SELECTOR       8
#define INTERRUPT_GATE      0x8e00      /* present, and clears IF */

/* What vector_stubs and `interrupted` in entry.S push, and below it the CPU. */
struct frame {
    uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax;
    uint32_t vector, error;
    uint32_t eip, cs, eflags;
};

/* Entry n of cpus[], and stack n of `stacks`, belong to the CPU with APIC ID n. */
struct cpu {
    bool x2apic;
    uint32_t tasks;             /* the value of `tasks` it has dealt with */
};

struct gate {
    uint16_t offset_low, selector, type, offset_high;
};

struct table_register {
    uint16_t limit;
    uint32_t base;
} __attribute__((packed));

extern const uint8_t vector_stubs[], vector_stubs_end[];
extern const uint8_t startup[], stacks[], stacks_end[];

/* volatile also for the order of the stores, which is all x86 needs for it. */
static volatile struct probe_mailbox *const mailbox = (void *)PROBE_MAILBOX;
static struct gate idt[PROBE_VECTORS];
static volatile bool active;    /* a device interrupt came since last asked */
static bool interrupts = true;  /* the first CPU's IF */

static struct cpu cpus[PROBE_CPUS];     /* each is used by its own CPU only */
static void (*volatile task)(struct cpu *cpu);
static volatile uint32_t tasks, tasks_left;

static volatile uint32_t lock;  /* of the counters, the log, and this: */
static struct {
    uint32_t address, data;
} acknowledgements[PROBE_VECTORS];

void interrupt(const struct frame *frame);
_Noreturn void probe_main(void);
_Noreturn void probe_wake(void);
_Noreturn void ap_main(uint32_t id);

static uint32_t load(uint32_t address, uint32_t width)
{
    switch (width) {
    case 1:
        return *(volatile uint8_t *)address;
    case 2:
        return *(volatile uint16_t *)address;
    default:
        return *(volatile uint32_t *)address;
    }
}

static void store(uint32_t address, uint32_t width, uint32_t value)
{
    switch (width) {
    case 1:
        *(volatile uint8_t *)address = value;
        break;
    case 2:
        *(volatile uint16_t *)address = value;
        break;
    default:
        *(volatile uint32_t *)address = value;
    }
}

static uint32_t port_in(uint16_t port, uint32_t width)
{
    uint32_t value = 0;

    switch (width) {
    case 1:
        asm volatile("inb %1, %b0" : "+a"(value) : "Nd"(port) : "memory");
        break;
    case 2:
        asm volatile("inw %1, %w0" : "+a"(value) : "Nd"(port) : "memory");
        break;
    default:
        asm volatile("inl %1, %0" : "+a"(value) : "Nd"(port) : "memory");
    }
    return value;
}

static void port_out(uint16_t port, uint32_t width, uint32_t value)
{
    switch (width) {
    case 1:
        asm volatile("outb %b0, %1" : : "a"(value), "Nd"(port) : "memory");
        break;
    case 2:
        asm volatile("outw %w0, %1" : : "a"(value), "Nd"(port) : "memory");
        break;
    default:
        asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
    }
}

/* Selects a dword of configuration space; returns the port for the address. */
static uint16_t config_port(uint32_t address)
{
    port_out(PCI_CONFIG_ADDRESS, 4, PCI_CONFIG_ENABLE | (address & ~3u));
    return PCI_CONFIG_DATA + (address & 3);
}

static uint64_t msr_read(uint32_t index)
{
    uint64_t value;

    asm volatile("rdmsr" : "=A"(value) : "c"(index) : "memory");
    return value;
}

static void msr_write(uint32_t index, uint64_t value)
{
    asm volatile("wrmsr" : : "A"(value), "c"(index) : "memory");
}

static uint64_t tsc_read(void)
{
    uint64_t value;

    asm volatile("rdtsc" : "=A"(value) : : "memory");
    return value;
}

/* The harness reads at any time, and must never see half of a new value. */
static void publish64(volatile uint64_t *field, uint64_t value)
{
    __sync_bool_compare_and_swap(field, *field, value);
}

/* To the LAPIC of the CPU that runs this, which is cpu. */
static void lapic_write(const struct cpu *cpu, uint32_t reg, uint32_t value)
{
    if (cpu->x2apic) {
        msr_write(X2APIC_MSRS + reg / 16, value);
    } else {
        store(LAPIC + reg, 4, value);
    }
}

/* From the first CPU to all the others. */
static void others_signal(uint32_t message)
{
    lapic_write(&cpus[0], LAPIC_ICR, LAPIC_ICR_OTHERS | message);
}

static void pause(void)
{
    asm volatile("pause" : : : "memory");
}

static void interrupts_enable(void)
{
    asm volatile("sti" : : : "memory");
}

static void interrupts_disable(void)
{
    asm volatile("cli" : : : "memory");
}

/* On the first CPU, after interrupts_disable(). */
static void interrupts_restore(void)
{
    if (interrupts) {
        interrupts_enable();
    }
}

/* With interrupts off only, because interrupt() takes it as well. */
static void lock_take(void)
{
    while (__sync_lock_test_and_set(&lock, 1)) {
        pause();
    }
}

static void lock_release(void)
{
    __sync_lock_release(&lock);
}

static _Noreturn void stop(void)
{
    for (;;) {
        asm volatile("cli; hlt" : : : "memory");
    }
}

/* Takes no lock: an NMI may come to a CPU that holds it. */
static _Noreturn void fault(const struct frame *frame)
{
    static volatile uint32_t faulted;
    uint32_t cr2;

    __sync_fetch_and_add(&mailbox->counters[frame->vector], 1);
    if (!__sync_lock_test_and_set(&faulted, 1)) {
        asm volatile("mov %%cr2, %0" : "=r"(cr2));
        mailbox->fault_vector = frame->vector;
        mailbox->fault_error = frame->error;
        mailbox->fault_eip = frame->eip;
        mailbox->fault_cr2 = cr2;
        mailbox->state = PROBE_FAULTED;
    }
    stop();
}

static void log_delivery(uint32_t vector, uint32_t cpu)
{
    uint32_t sequence = mailbox->log_count;
    volatile struct probe_delivery *entry = &mailbox->log[sequence % PROBE_LOG];

    entry->tsc = tsc_read();
    entry->vector = vector;
    entry->cpu = cpu;
    entry->sequence = sequence;
    mailbox->log_count = sequence + 1;
}

void interrupt(const struct frame *frame)
{
    uint32_t vector = frame->vector;
    uint32_t stack_size = (stacks_end - stacks) / PROBE_CPUS;
    uint32_t id = ((uint32_t)frame - (uint32_t)stacks) / stack_size;

    if (vector < EXCEPTIONS) {
        fault(frame);
    }
    lock_take();
    if (acknowledgements[vector].address) {
        store(acknowledgements[vector].address, 4, acknowledgements[vector].data);
    }
    if (vector != PROBE_TIMER) {
        log_delivery(vector, id);
        active = true;
    }
    /* Last: who sees these knows that the log has it. */
    mailbox->counters[vector]++;
    mailbox->taken[id][vector]++;
    lock_release();
    while (mailbox->held == vector) {
        /* No hlt: the first CPU alone has a timer to wake it up. */
        interrupts_enable();
        pause();
        interrupts_disable();
    }
    if (vector != PROBE_SPURIOUS) {
        lapic_write(&cpus[id], LAPIC_EOI, 0);
    }
}

/* With interrupts off, and none in service. */
static void task_do(struct cpu *cpu)
{
    if (cpu->tasks != tasks) {
        cpu->tasks = tasks;
        task(cpu);
        __sync_fetch_and_sub(&tasks_left, 1);
    }
}

/* Has each CPU do a task; returns when all have. */
static void on_every_cpu(void (*work)(struct cpu *cpu))
{
    task = work;
    tasks_left = mailbox->cpus;
    tasks++;
    interrupts_disable();
    if (mailbox->cpus > 1) {
        others_signal(PROBE_TIMER);
    }
    task_do(&cpus[0]);
    interrupts_restore();
    while (tasks_left) {
        pause();
    }
}

static void x2apic_enter(struct cpu *cpu)
{
    msr_write(APIC_BASE_MSR, msr_read(APIC_BASE_MSR) | APIC_BASE_X2APIC);
    cpu->x2apic = true;
}

static void logical_id_set(struct cpu *cpu)
{
    if (!cpu->x2apic) {
        lapic_write(cpu, LAPIC_DFR, LAPIC_DFR_FLAT);
        lapic_write(cpu, LAPIC_LDR, 1u << (24 + (cpu - cpus)));
    }
}

static void acknowledge(uint32_t vector, uint32_t address, uint32_t data)
{
    interrupts_disable();
    lock_take();
    acknowledgements[vector].address = address;
    acknowledgements[vector].data = data;
    lock_release();
    interrupts_restore();
}

static bool x2apic_present(void)
{
    uint32_t eax = 1, ebx, ecx, edx;

    asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
    return ecx & CPUID_1_ECX_X2APIC;
}

static bool acceptable(uint32_t opcode, uint32_t width, uint64_t address, uint64_t value)
{
    switch (opcode) {
    case PROBE_NOP:
    case PROBE_INTERRUPTS:
    case PROBE_LOGICAL:
        return true;
    case PROBE_X2APIC:
        return x2apic_present();
    case PROBE_ACKNOWLEDGE:
        return address < 1ull << 32 && !(address & 3) &&
               value >> 32 >= EXCEPTIONS && value >> 32 < PROBE_VECTORS;
    case PROBE_MSR_READ:
    case PROBE_MSR_WRITE:
        return address < 1ull << 32;
    }

    if (width != 1 && width != 2 && width != 4) {
        return false;
    }
    switch (opcode) {
    case PROBE_CFG_READ:
    case PROBE_CFG_WRITE:
        return address < 1 << 24 && !(address & (width - 1));
    case PROBE_MMIO_READ:
    case PROBE_MMIO_WRITE:
        return address < 1ull << 32;
    case PROBE_PORT_IN:
    case PROBE_PORT_OUT:
    case PROBE_SLEEP:
        return address < 1 << 16;
    }
    return false;
}

/* The machine resets this CPU, which then begins at probe_wake(). */
static _Noreturn void sleep(uint16_t port, uint32_t width, uint32_t value)
{
    interrupts_disable();
    mailbox->state = PROBE_ASLEEP;
    port_out(port, width, value);
    stop();
}

static void execute(volatile struct probe_op *op, uint32_t width, uint32_t address)
{
    uint64_t value = op->value;

    switch (op->op) {
    case PROBE_CFG_READ:
        op->value = port_in(config_port(address), width);
        break;
    case PROBE_CFG_WRITE:
        port_out(config_port(address), width, value);
        break;
    case PROBE_MMIO_READ:
        op->value = load(address, width);
        break;
    case PROBE_MMIO_WRITE:
        store(address, width, value);
        break;
    case PROBE_PORT_IN:
        op->value = port_in(address, width);
        break;
    case PROBE_PORT_OUT:
        port_out(address, width, value);
        break;
    case PROBE_MSR_READ:
        op->value = msr_read(address);
        break;
    case PROBE_MSR_WRITE:
        msr_write(address, value);
        break;
    case PROBE_INTERRUPTS:
        interrupts = value;
        interrupts_disable();
        interrupts_restore();
        break;
    case PROBE_X2APIC:
        on_every_cpu(x2apic_enter);
        break;
    case PROBE_LOGICAL:
        on_every_cpu(logical_id_set);
        break;
    case PROBE_ACKNOWLEDGE:
        acknowledge(value >> 32, address, value);
        break;
    case PROBE_SLEEP:
        sleep(address, width, value);
    }
}

static uint32_t execute_batch(uint32_t count)
{
    if (count > PROBE_OPS) {
        return PROBE_OPS + 1;
    }
    for (uint32_t i = 0; i < count; i++) {
        volatile struct probe_op *op = &mailbox->ops[i];

        if (!acceptable(op->op, op->width, op->address, op->value)) {
            return i + 1;
        }
        execute(op, op->width, op->address);
    }
    return 0;
}

/* Returns whether there was a request. */
static bool serve(void)
{
    uint32_t request = mailbox->request;

    if (request != mailbox->done + 1) {
        return false;
    }
    mailbox->result = execute_batch(mailbox->count);
    mailbox->done = request;
    return true;
}

static void clear(volatile void *start, size_t size)
{
    volatile uint32_t *word = start;

    for (size_t i = 0; i < size / sizeof(*word); i++) {
        word[i] = 0;
    }
}

static void idt_setup(void)
{
    uint32_t size = (vector_stubs_end - vector_stubs) / PROBE_VECTORS;

    for (uint32_t vector = 0; vector < PROBE_VECTORS; vector++) {
        uint32_t stub = (uint32_t)vector_stubs + vector * size;

        idt[vector] = (struct gate) { stub, CODE_SELECTOR, INTERRUPT_GATE, stub >> 16 };
    }
}

/* Makes a CPU ready to take interrupts, but for sti. */
static void cpu_setup(struct cpu *cpu)
{
    struct table_register idtr = { sizeof(idt) - 1, (uint32_t)idt };

    if (mailbox->state != PROBE_ASLEEP) {
        clear(mailbox->taken[cpu - cpus], sizeof(mailbox->taken[0]));
    }
    asm volatile("lidt %0" : : "m"(idtr) : "memory");
    lapic_write(cpu, LAPIC_SVR, LAPIC_SVR_ENABLE | PROBE_SPURIOUS);
    __sync_fetch_and_add(&mailbox->cpus, 1);
}

/* After cpu_setup(), because a disabled LAPIC keeps every LVT entry masked. */
static void timer_setup(struct cpu *cpu)
{
    lapic_write(cpu, LAPIC_LVT_LINT0, LAPIC_LVT_MASKED);
    lapic_write(cpu, LAPIC_LVT_LINT1, LAPIC_LVT_MASKED);
    lapic_write(cpu, LAPIC_TIMER_DIVIDE, LAPIC_DIVIDE_BY_1);
    lapic_write(cpu, LAPIC_LVT_TIMER, LAPIC_LVT_PERIODIC | PROBE_TIMER);
    lapic_write(cpu, LAPIC_TIMER_INITIAL, TICK_BUSY);
}

/* Starts the other CPUs; returns when they are up.  A guest with one does not wait. */
static void others_start(void)
{
    uint32_t page = (uint32_t)startup >> 12, announced;

    port_out(FW_CFG_SELECTOR, 2, FW_CFG_CPUS);
    announced = port_in(FW_CFG_DATA, 1);
    announced |= port_in(FW_CFG_DATA, 1) << 8;
    if (announced > 1) {
        /* MultiProcessor Specification 1.4, B.4, but for the delays: no vCPU needs them. */
        others_signal(LAPIC_ICR_INIT);
        others_signal(LAPIC_ICR_STARTUP | page);
        others_signal(LAPIC_ICR_STARTUP | page);
    }
    while (mailbox->cpus < announced) {
        pause();
    }
}

/*
 * Polls while requests or interrupts keep coming, for the harness's latency;
 * otherwise sleeps until the next tick, and after a while ticks more slowly,
 * because an idle guest must leave the CPU to whatever else runs there.
 */
static _Noreturn void main_loop(void)
{
    uint64_t last_active = tsc_read();
    bool busy = true;

    while (mailbox->state != PROBE_FAULTED) {
        uint64_t now = tsc_read();

        publish64(&mailbox->loops, mailbox->loops + 1);
        publish64(&mailbox->tsc, now);
        if (serve() || active) {
            active = false;
            last_active = now = tsc_read();
        }
        /* As a difference, so that a TSC which goes back cannot keep us hot. */
        if (!interrupts || now - last_active < HOT_CYCLES) {
            pause();
            continue;
        }
        if (busy != now - last_active < BUSY_CYCLES) {
            busy = !busy;
            lapic_write(&cpus[0], LAPIC_TIMER_INITIAL, busy ? TICK_BUSY : TICK_IDLE);
        }
        interrupts_disable();
        if (active) {
            interrupts_enable();
        } else {
            /* sti holds interrupts off for one more instruction: none is missed. */
            asm volatile("sti; hlt" : : : "memory");
        }
    }
    stop();
}

void ap_main(uint32_t id)
{
    cpu_setup(&cpus[id]);
    for (;;) {
        interrupts_disable();
        task_do(&cpus[id]);
        asm volatile("sti; hlt" : : : "memory");
    }
}

/* From a reset to taking requests. */
static _Noreturn void run(void)
{
    port_out(PIC_MASTER_MASK, 1, 0xff);
    port_out(PIC_SLAVE_MASK, 1, 0xff);
    idt_setup();
    cpu_setup(&cpus[0]);
    timer_setup(&cpus[0]);
    others_start();
    interrupts_enable();
    mailbox->state = PROBE_READY;
    main_loop();
}

void probe_main(void)
{
    uint32_t boots = mailbox->boots;

    clear(mailbox, offsetof(struct probe_mailbox, log));
    mailbox->boots = boots + 1;
    mailbox->version = PROBE_VERSION;
    mailbox->magic = PROBE_MAGIC;
    run();
}

void probe_wake(void)
{
    mailbox->cpus = 0;
    for (uint32_t id = 0; id < PROBE_CPUS; id++) {
        cpus[id] = (struct cpu) { .tasks = tasks };
    }
    /* Whoever held it is gone. */
    lock_release();
    /* The request for sleep, which is what main_loop() would find. */
    mailbox->result = 0;
    mailbox->done = mailbox->request;
    run();
}
