//! The documents name tests, and every one of them exists; each promise has one, and each class of failure has one or a reason
//! why not.
//!
//! A name is `file.rs::test` in backticks, the file as seen from the top of the repository. It is that of a test function, or
//! of one that macros of this crate make tests of, or of a module of tests; `file.rs::compile_fail` is an example that must
//! not compile.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use vm_scrub_tests::documents::{code_spans, links, section, table};

const SPECIFICATION: &str = include_str!("../../SPECIFICATION.md");
const FAILURE_CLASSES: &str = include_str!("../../docs/failure-classes.md");
const KERNELS: &str = include_str!("../../docs/kernels.md");

/// The classes that `docs/failure-classes.md` begins with; those of pools that are reused come after them.
const CLASSES: usize = 21;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Whether this program runs where it was built; elsewhere there is nothing to compare with, and it says so.
fn has_sources() -> bool {
    let has = root().join("SPECIFICATION.md").exists();
    if !has {
        vm_scrub_tests::skipped(&"the sources are not on this machine");
    }
    has
}

/// The tests that `text` names: file and name.
fn named(text: &str) -> Vec<(&str, &str)> {
    code_spans(text)
        .filter_map(|span| span.split_once("::"))
        .filter(|(file, _)| file.ends_with(".rs"))
        .collect()
}

fn is_of_a_name(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// The name that is declared by a line that begins with `keyword`, if it is one.
fn declared<'a>(line: &'a str, keyword: &str) -> Option<&'a str> {
    let rest = line.trim_start().strip_prefix(keyword)?;
    rest.split(|char| !is_of_a_name(char)).next()
}

/// Whether `source` has a test of this name.
fn has_test(source: &str, name: &str) -> bool {
    if name == "compile_fail" {
        return source.contains("```compile_fail");
    }
    let lines: Vec<&str> = source.lines().collect();
    let is_test = |at: &usize| lines[*at].trim() == "#[test]";
    let functions = (0..lines.len()).filter(is_test).filter_map(|at| {
        let mut behind = lines[at..].iter();
        behind.find_map(|line| declared(line, "fn "))
    });
    let modules = (0..lines.len()).filter(is_test).filter_map(|at| {
        let mut before = lines[..at].iter().rev();
        before.find_map(|line| declared(line, "mod "))
    });
    functions.chain(modules).any(|test| test == name) || is_made_a_test(source, name)
}

/// Whether `name` is a function here and given to one of the macros that make tests of functions.
fn is_made_a_test(source: &str, name: &str) -> bool {
    let is_function = source
        .lines()
        .any(|line| declared(line, "fn ") == Some(name));
    let macros = [
        "on_every_page_size!",
        "on_small_page_sizes!",
        "\nwalks!",
        "\nby_page_size!",
    ];
    let mut lists = macros.iter().flat_map(|of| source.split(of).skip(1));
    let is_given = lists.any(|list| {
        let closed = if list.trim_start().starts_with('(') {
            ");"
        } else {
            "\n}"
        };
        let end = list.find(closed).unwrap_or(list.len());
        list[..end]
            .split(|char| !is_of_a_name(char))
            .any(|word| word == name)
    });
    is_function && is_given
}

/// The tests that `text` names and that do not exist.
fn missing(text: &str) -> Vec<String> {
    let mut sources: BTreeMap<&str, String> = BTreeMap::new();
    let mut missing = Vec::new();
    for (file, name) in named(text) {
        let source = sources
            .entry(file)
            .or_insert_with(|| fs::read_to_string(root().join(file)).unwrap_or_default());
        if !has_test(source, name) {
            missing.push(format!("{file}::{name}"));
        }
    }
    missing
}

#[test]
fn every_test_that_is_named_exists() {
    if !has_sources() {
        return;
    }
    for document in [SPECIFICATION, FAILURE_CLASSES, KERNELS] {
        assert!(!named(document).is_empty());
        assert_eq!(missing(document), Vec::<String>::new());
    }
}

/// The look-up itself can fail.
#[test]
fn a_test_that_does_not_exist_is_missed() {
    if !has_sources() {
        return;
    }
    let here = "tests/tests/specification.rs";
    for (name, exists) in [
        ("a_test_that_does_not_exist_is_missed", true),
        ("a_test_that_does_not_exist", false),
        // A function, and no test.
        ("has_test", false),
        ("", false),
    ] {
        assert_eq!(missing(&format!("`{here}::{name}`")).is_empty(), exists);
    }
    assert_eq!(
        missing("`tests/tests/gone.rs::any`"),
        ["tests/tests/gone.rs::any"]
    );
    // Made a test by a macro, and a helper of the same file.
    let dropped = "tests/tests/dropped.rs";
    assert_eq!(
        missing(&format!("`{dropped}::forgotten`")),
        Vec::<String>::new()
    );
    assert_eq!(missing(&format!("`{dropped}::dirty_guest`")).len(), 1);
}

/// Numbered paragraphs, `- **P1. Title.** text`, in order and without gaps: what each says.
fn numbered(letter: char, title: &str) -> Vec<&'static str> {
    let mark = format!("- **{letter}");
    let entries: Vec<&str> = section(SPECIFICATION, title).split(&mark).skip(1).collect();
    for (at, entry) in entries.iter().enumerate() {
        let number = entry.split('.').next().map(str::parse);
        assert_eq!(number, Some(Ok(at + 1)), "{letter}{entry}");
    }
    assert!(!entries.is_empty());
    entries
}

#[test]
fn every_promise_has_a_test() {
    for promise in numbered('P', "Promises") {
        assert!(!named(promise).is_empty(), "no test of P{promise}");
    }
}

#[test]
fn what_is_not_promised_is_numbered_and_the_mapping_names_what_there_is() {
    let promises = numbered('P', "Promises").len();
    let others = numbered('N', "Not promised").len();
    let mapping = table(section(SPECIFICATION, "Controls"));
    let column = mapping.column("vm-scrub");
    for row in &mapping.rows {
        let words = row[column].split(|char: char| !char.is_alphanumeric());
        let mut references = 0;
        for word in words {
            let (letter, number) = word.split_at(word.len().min(1));
            if let Ok(number) = number.parse::<usize>() {
                let last = match letter {
                    "P" => promises,
                    "N" => others,
                    _ => continue,
                };
                assert!((1..=last).contains(&number), "{word} in {row:?}");
                references += 1;
            }
        }
        assert!(references > 0, "{row:?}");
    }
}

#[test]
fn every_class_of_failure_has_a_test_or_a_reason() {
    let classes = table(section(FAILURE_CLASSES, "Classes"));
    let (number, test) = (classes.column("#"), classes.column("test"));
    let why = classes.column("how it is kept out, or why it does not apply");
    for (at, row) in classes.rows.iter().take(CLASSES).enumerate() {
        assert_eq!(row[number], (at + 1).to_string());
    }
    assert!(classes.rows.len() >= CLASSES);
    for row in &classes.rows {
        let why = &row[why];
        let reason = why.starts_with("Does not apply: ") || why.starts_with("Not tested: ");
        assert!(named(&row[test]).is_empty() == reason, "{row:?}");
    }
}

#[test]
fn every_feature_that_is_looked_for_is_explained_and_has_a_test() {
    let features = table(section(KERNELS, "Optional features"));
    let (name, since) = (features.column("feature"), features.column("since Linux"));
    let test = features.column("test");
    let explained = features.rows.iter();
    let explained: Vec<_> = explained
        .map(|row| (row[name].replace('`', ""), row[since].clone()))
        .collect();
    let looked_for: Vec<_> = vm_scrub::test_support::kernel_features()
        .map(|(name, since)| (name.to_owned(), since.to_owned()))
        .collect();
    assert_eq!(explained, looked_for);
    for row in &features.rows {
        assert!(!named(&row[test]).is_empty(), "{row:?}");
    }
}

#[test]
fn links_lead_somewhere() {
    if !has_sources() {
        return;
    }
    let documents = ["README.md", "SECURITY.md", "SPECIFICATION.md", "DESIGN.md"].map(String::from);
    let directory = fs::read_dir(root().join("docs")).unwrap();
    let rest = directory.map(|entry| format!("docs/{}", entry.unwrap().file_name().display()));
    for document in documents.into_iter().chain(rest) {
        let path = root().join(&document);
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for link in links(&text).filter(|link| !link.contains("://")) {
            let target = path.parent().unwrap().join(link);
            assert!(target.exists(), "{document}: {link}");
        }
    }
}
