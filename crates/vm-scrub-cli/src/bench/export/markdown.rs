//! `--export-markdown`: one table for each group, to be pasted into issues and READMEs.

use super::Exporter;
use crate::bench::results::Results;
use crate::bench::summary;
use crate::bench::table::{Table, is_text};
use std::fmt::Write;

pub(crate) struct Markdown;

impl Exporter for Markdown {
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>> {
        let mut text = String::new();
        for (what, fact) in results.setup.facts() {
            writeln!(text, "- {what}: {fact}")?;
        }
        let answers = summary::of(results);
        if !answers.is_empty() {
            let table = table(&summary::table(&answers));
            writeln!(text, "\n## summary\n\n{}\n\n{table}", summary::ABOUT)?;
        }
        for benchmark in results.benchmarks() {
            writeln!(text, "\n## {benchmark}")?;
            for (title, rows) in results.groups(benchmark) {
                writeln!(text, "\n### {title}\n\n{}", table(&Table::of(rows)))?;
            }
        }
        for (heading, notes) in [("skipped", &results.skipped), ("failed", &results.failed)] {
            if notes.is_empty() {
                continue;
            }
            writeln!(text, "\n## {heading}\n")?;
            for note in notes {
                let who = note
                    .contender
                    .as_ref()
                    .map_or(String::new(), |name| format!(", {name}"));
                writeln!(
                    text,
                    "- {}, {}{who}: {}",
                    note.benchmark, note.group, note.reason
                )?;
            }
        }
        Ok(text.into_bytes())
    }
}

fn table(table: &Table) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| escaped(cell)).collect();
        format!("| {} |", cells.join(" | "))
    };
    let rules = (0..table.headings.len()).map(|column| {
        let text = table.rows.iter().all(|row| is_text(column, &row[column]));
        String::from(if text { ":---" } else { "---:" })
    });
    let rules: Vec<String> = rules.collect();
    let mut lines = vec![line(&table.headings), format!("|{}|", rules.join("|"))];
    lines.extend(table.rows.iter().map(|row| line(row)));
    lines.join("\n")
}

fn escaped(cell: &str) -> String {
    cell.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn tables_have_as_many_cells_in_each_line() {
        let text = String::from_utf8(Markdown.export(&samples::results()).expect("exported"))
            .expect("text");
        let mut tables = 0;
        for block in text.split("\n\n").filter(|block| block.starts_with('|')) {
            let cells = |line: &str| line.replace("\\|", "").matches('|').count();
            let lines: Vec<&str> = block.trim().lines().collect();
            assert!(lines.len() > 2 && lines[1].starts_with("|:---|"), "{block}");
            assert!(
                lines.iter().all(|line| cells(line) == cells(lines[0])),
                "{block}"
            );
            tables += 1;
        }
        assert!(tables >= 2, "{text}");
        assert!(text.contains("| vm-scrub | full | 2 | 20.0 ms |"), "{text}");
        assert!(text.contains("\n## summary\n"), "{text}");
        assert!(text.contains("## skipped"), "{text}");
    }

    #[test]
    fn bars_do_not_end_a_cell() {
        assert_eq!(escaped("a|b"), "a\\|b");
    }
}
