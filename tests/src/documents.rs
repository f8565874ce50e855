//! The project's documents, for the tests that hold them to the code: tables, code spans, links.
//!
//! As much of Markdown as these documents use. A cell has no `|` in it, and a code span begins and ends on one line.

/// A table: what its columns are called, and its rows, cell by cell.
#[derive(Debug)]
pub struct Table {
    /// The first line.
    pub columns: Vec<String>,
    /// The lines below the rule.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// The number of the column with this name.
    ///
    /// # Panics
    /// If there is none.
    pub fn column(&self, name: &str) -> usize {
        let found = self.columns.iter().position(|column| column == name);
        found.unwrap_or_else(|| panic!("no column '{name}' in {:?}", self.columns))
    }
}

/// The text below the heading that ends with `title`, up to the next heading of the same level or a higher one.
///
/// # Panics
/// If there is no such heading.
pub fn section<'a>(document: &'a str, title: &str) -> &'a str {
    let level = |line: &str| line.chars().take_while(|char| *char == '#').count();
    let mut at = 0;
    let mut found: Option<(usize, usize)> = None;
    for line in document.split_inclusive('\n') {
        let depth = level(line);
        match found {
            None if depth > 0 && line.trim_end().ends_with(title) => {
                found = Some((at + line.len(), depth));
            }
            Some((start, own)) if depth > 0 && depth <= own => return &document[start..at],
            _ => {}
        }
        at += line.len();
    }
    let (start, _) = found.unwrap_or_else(|| panic!("no heading '{title}'"));
    &document[start..]
}

/// The first table in `text`.
///
/// # Panics
/// If there is none, or a row has another number of cells than the first line.
pub fn table(text: &str) -> Table {
    let mut lines = text
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells = line.trim().trim_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        });
    let columns = lines.next().expect("there is a table");
    let rows: Vec<Vec<String>> = lines.skip(1).collect();
    for row in &rows {
        assert_eq!(row.len(), columns.len(), "{row:?}");
    }
    Table { columns, rows }
}

/// What stands between backticks.
pub fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().filter(|line| !line.starts_with("```"));
    lines.flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Where the links of a document lead, without the part behind `#`.
pub fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1);
    targets
        .filter_map(|rest| rest.split(')').next())
        .filter_map(|target| target.split('#').next())
        .filter(|target| !target.is_empty())
}
