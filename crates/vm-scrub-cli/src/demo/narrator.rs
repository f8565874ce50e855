//! Tells a person what happens, step by step; with `--json`, says nothing until the end.

use super::guest::GuestKind;
use super::report::Report;
use super::secrets;
use crate::args::DemoArgs;
use crate::format::{bytes, millis};
use crate::output::Output;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Display;
use std::time::Duration;
use vm_scrub::lease::QuarantineReason;
use vm_scrub::{Lease, Revocation, ScrubReceipt};
use vm_scrub_vmm::{Deliveries, Scan};

/// More receipts than a table shows.
const MAX_ROWS: usize = 20;

pub(crate) struct Narrator {
    json: bool,
    output: Output,
}

impl Narrator {
    pub(crate) fn new(args: &DemoArgs) -> Self {
        // Each guest is leased, filled, torn down and, but for the first, looks around. Hidden where standard error is no
        // terminal.
        let steps = u64::from(args.guests) * 3 - 2;
        let target = if args.json {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let progress = ProgressBar::with_draw_target(Some(steps), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}") {
            progress.set_style(style);
        }
        progress.enable_steady_tick(Duration::from_millis(100));
        Self {
            json: args.json,
            output: Output::around(progress),
        }
    }

    fn say(&self, line: impl Display) {
        if !self.json {
            self.print(line);
        }
    }

    fn print(&self, line: impl Display) {
        self.output.print(line);
    }

    fn remark(&self, line: impl Display) {
        self.output.remark(line);
    }

    /// Fails if the results cannot be written.
    pub(crate) fn ensure_somebody_reads(&self) -> anyhow::Result<()> {
        self.output.ensure_somebody_reads()
    }

    pub(crate) fn no_kvm(&self, error: &impl Display) {
        self.remark(format_args!(
            "no KVM guests, guest threads instead: {error}"
        ));
    }

    pub(crate) fn huge_pages(&self, added: u64) {
        if added > 0 {
            self.remark(format_args!(
                "vm.nr_hugepages raised by {added} for the time of the demonstration"
            ));
        }
    }

    pub(crate) fn begin(&self, report: &Report) {
        self.say(format_args!(
            "A pool of {} in {} pages, for one {} at a time.",
            bytes(report.memory_bytes),
            report.page_size,
            match report.guest {
                GuestKind::Kvm => "KVM guest",
                GuestKind::Threads => "guest",
            }
        ));
        if report.guest == GuestKind::Threads {
            self.say("There is no KVM here: guests are threads of this process, and 'its own code' is theirs.");
        }
    }

    pub(crate) fn step(&self, guest: &str, doing: &str) {
        self.output.bar.set_message(format!("{guest} {doing}"));
        self.output.bar.inc(1);
    }

    pub(crate) fn leased(&self, guest: &str, lease: &Lease) {
        let extents: Vec<String> = lease
            .blocks()
            .iter()
            .map(|extent| format!("{}..{}", extent.first, extent.first + extent.blocks))
            .collect();
        self.say(format_args!(
            "{guest} is leased {} (blocks {}).",
            bytes(lease.bytes()),
            extents.join(", ")
        ));
    }

    pub(crate) fn looked(&self, guest: &str, found: &Scan) {
        match found.first_nonzero {
            None => self.say(format_args!(
                "{guest} reads all of it by its own code: {} read, not one byte is different from zero.",
                bytes(found.bytes_read)
            )),
            Some(word) => {
                let owner = secrets::owner(word.value).unwrap_or_else(|| "somebody".into());
                self.say(format_args!(
                    "{guest} reads all of it by its own code: {} bytes are NOT ZERO. The first word, at guest address {:#x}, \
                     was written by {owner}.",
                    found.nonzero_bytes, word.gpa
                ));
            }
        }
    }

    pub(crate) fn filled(&self, guest: &str, found: u64) {
        self.say(format_args!(
            "{guest} fills it with a secret by its own code, a device adds another: the VMM sees {} of secrets.",
            bytes(found)
        ));
    }

    pub(crate) fn stray_device_started(&self, landed: u64) {
        self.say(format_args!(
            "A device takes pointers into that memory: {landed} writes landed, and it will go on whatever happens."
        ));
    }

    pub(crate) fn stray_device(&self, after: &Deliveries) {
        self.say(format_args!(
            "The device is still writing through its pointers: {} writes landed, {} were refused by the kernel.",
            after.landed, after.refused
        ));
    }

    pub(crate) fn torn_down(&self, receipt: &ScrubReceipt) {
        let guest = receipt.guest.as_deref().unwrap_or("the guest");
        self.say(format_args!(
            "{guest} is torn down in {}: taken away by {}, {} zeroed, {} of it read back as zero, {} never populated, {} quarantined.",
            millis(receipt.elapsed_ns),
            way(receipt.revocation),
            bytes(receipt.bytes_scrubbed),
            bytes(receipt.bytes_verified),
            bytes(receipt.bytes_never_populated),
            bytes(receipt.bytes_quarantined)
        ));
        if let Some(first) = receipt.quarantined.first() {
            let found = first.reason == QuarantineReason::NotZero;
            let who = if found {
                "Verification caught the scrubber"
            } else {
                "That is in quarantine"
            };
            self.say(format_args!("{who}: {}.", first.detail));
        }
    }

    pub(crate) fn refused(&self, guest: &str, error: &impl Display) {
        self.say(format_args!("{guest} gets no memory: {error}."));
    }

    /// Prints the result.
    pub(crate) fn end(&self, report: &Report) -> anyhow::Result<()> {
        self.output.bar.finish_and_clear();
        if self.json {
            self.print(serde_json::to_string_pretty(report)?);
        } else {
            self.print(receipts(&report.receipts));
            self.print(conclusion(report));
        }
        self.ensure_somebody_reads()
    }
}

/// How a guest's memory was taken away.
fn way(revocation: Revocation) -> &'static str {
    match revocation {
        Revocation::Move => "UFFDIO_MOVE",
        Revocation::Mremap => "mremap",
        Revocation::ViewReplaced => "replacing its view",
        Revocation::Sealed => "sealing its file",
        _ => "other means",
    }
}

fn receipts(receipts: &[ScrubReceipt]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "guest",
        "total",
        "scrubbed",
        "never populated",
        "quarantined",
        "verified",
        "loop",
        "threads",
        "revoke",
        "scrub",
        "verify",
        "all",
        "outcome",
    ]);
    for receipt in receipts.iter().take(MAX_ROWS) {
        let numbers = [
            bytes(receipt.bytes_total),
            bytes(receipt.bytes_scrubbed),
            bytes(receipt.bytes_never_populated),
            bytes(receipt.bytes_quarantined),
            bytes(receipt.bytes_verified),
        ];
        let times = [
            receipt.steps.revoke_ns,
            receipt.steps.scrub_ns,
            receipt.steps.verify_ns,
            receipt.elapsed_ns,
        ];
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut row = vec![Cell::new(receipt.guest.as_deref().unwrap_or("-"))];
        row.extend(numbers.map(right));
        row.extend([
            Cell::new(&receipt.zero_loop),
            right(receipt.threads.to_string()),
        ]);
        row.extend(times.map(|nanos| right(millis(nanos))));
        row.push(Cell::new(format!("{:?}", receipt.outcome).to_lowercase()));
        table.add_row(row);
    }
    match receipts.len().checked_sub(MAX_ROWS) {
        None | Some(0) => table.to_string(),
        Some(more) => format!("{table}\n... and {more} more (all of them with --json)"),
    }
}

/// One line that anybody understands.
fn conclusion(report: &Report) -> String {
    let secrets = bytes(report.secret_bytes_found_before_teardown);
    let last = report
        .guests
        .last()
        .map_or("the next guest", |guest| guest.name.as_str());
    if report.leaked_bytes > 0 {
        format!(
            "LEAKED: a guest could read {} bytes that its predecessor had left behind.",
            report.leaked_bytes
        )
    } else if let Some(lost) = report.first_lost_otherwise() {
        format!(
            "NOT PROVEN: {} are in quarantine, and no other guest got them: {}.",
            bytes(report.accounts.quarantined),
            lost.detail
        )
    } else if report.refused.is_some() {
        format!(
            "CAUGHT: the scrubber left something behind, verification found it, and {} are in quarantine; no other guest \
             got them.",
            bytes(report.accounts.quarantined)
        )
    } else if !report.args_can_prove {
        "NOT PROVEN: no guest found anything, but verification was off, so nothing was proven."
            .into()
    } else if !report.proven {
        format!(
            "NOT PROVEN: {} are in quarantine.",
            bytes(report.accounts.quarantined)
        )
    } else {
        let late = report.late_writes.map_or_else(String::new, |late| {
            format!(
                " Of the device's writes {} landed before the teardown was over and {} afterwards; {} were refused.",
                late.landed_before_revocation, late.landed_after_revocation, late.refused
            )
        });
        let threads = match report.guest {
            GuestKind::Kvm => "",
            GuestKind::Threads => " (The guests were threads.)",
        };
        format!(
            "PROVEN: guest-1 left {secrets} of secrets behind; {last} got the same memory and found none of \
             them.{late}{threads}"
        )
    }
}
