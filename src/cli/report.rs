//! Tables for people and the JSON that carries the same numbers.

use std::io::{self, Write};

use serde_json::Value;

use super::{failure::Failure, inputs::Rejected};

/// On which side a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows of cells that line up.
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Align)>) -> Self {
        let columns = columns.into_iter().map(|(name, align)| (name.to_owned(), align)).collect();
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row; cells that are missing at its end stay empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.chain([self.columns[column].0.chars().count()]).max().unwrap_or(0)
        };
        (0..self.columns.len()).map(width).collect()
    }

    /// Columns of the terminal that the table takes.
    pub(crate) fn width(&self) -> usize {
        let widths = self.widths();
        widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1)
    }

    /// Writes headings and rows, columns two spaces apart, no space at the end of lines.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let widths = self.widths();
        let headings: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, &width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                let space = " ".repeat(width.saturating_sub(cell.chars().count()));
                match align {
                    Align::Left => line.extend([cell.as_str(), &space, "  "]),
                    Align::Right => line.extend([space.as_str(), cell, "  "]),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Token counts along the blocks in little space: `197→184→171→…→41`, one number when nothing changes.
pub(crate) fn token_path(counts: &[usize]) -> String {
    let mut steps = counts.to_vec();
    steps.dedup();
    let shown = |steps: &[usize]| steps.iter().map(usize::to_string).collect::<Vec<_>>().join("→");
    match steps[..] {
        [ref first @ .., last] if first.len() > 4 => format!("{}→…→{last}", shown(&first[..3])),
        _ => shown(&steps),
    }
}

/// `4,608,338,304`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Multiply-adds with three digits and a unit: `583 M`, `4.61 G`.
pub(crate) fn quantity(number: u64) -> String {
    let number = number as f64;
    let (scaled, unit) = match number {
        n if n >= 1e12 => (n / 1e12, " T"),
        n if n >= 1e9 => (n / 1e9, " G"),
        n if n >= 1e6 => (n / 1e6, " M"),
        n if n >= 1e3 => (n / 1e3, " k"),
        n => return format!("{n}"),
    };
    format!("{}{unit}", three_digits(scaled))
}

/// `1 thread`, `2 threads`.
pub(crate) fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// `0.123`, `1.23`, `12.3`, `123`.
pub(crate) fn three_digits(number: f64) -> String {
    match number.abs() {
        n if n >= 99.95 => format!("{number:.0}"),
        n if n >= 9.995 => format!("{number:.1}"),
        n if n >= 0.9995 || n == 0.0 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// A share in percent, `59.2 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// The list `errors` of a report.
pub(crate) fn errors_json(rejected: &[Rejected]) -> Value {
    rejected.iter().map(|r| serde_json::json!({"image": r.name, "error": r.error})).collect()
}

/// Writes one JSON document and nothing else.
pub(crate) fn write_json(document: &Value) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// One JSON object on stdout whose list of images is written as it comes, one image a line.
pub(crate) struct JsonStream {
    out: io::BufWriter<io::StdoutLock<'static>>,
    empty: bool,
}

impl JsonStream {
    /// Begins with the members of `head`, then opens the list `images`.
    pub(crate) fn begin(head: &Value) -> Result<Self, Failure> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        writeln!(out, "{{")?;
        for (key, value) in head.as_object().into_iter().flatten() {
            writeln!(out, "  {}: {value},", Value::from(key.as_str()))?;
        }
        write!(out, "  \"images\": [")?;
        Ok(Self { out, empty: true })
    }

    /// One image.
    pub(crate) fn image(&mut self, image: &Value) -> Result<(), Failure> {
        let comma = if self.empty { "" } else { "," };
        self.empty = false;
        Ok(write!(self.out, "{comma}\n    {image}")?)
    }

    /// Hands over what was written so far.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        Ok(self.out.flush()?)
    }

    /// Closes the list and ends with the members of `tail`.
    pub(crate) fn end(mut self, tail: &Value) -> Result<(), Failure> {
        write!(self.out, "{}]", if self.empty { "" } else { "\n  " })?;
        for (key, value) in tail.as_object().into_iter().flatten() {
            write!(self.out, ",\n  {}: {value}", Value::from(key.as_str()))?;
        }
        writeln!(self.out, "\n}}")?;
        Ok(self.out.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_paths_are_short() {
        assert_eq!(token_path(&[197; 13]), "197");
        assert_eq!(token_path(&[197, 197, 139, 139, 98]), "197→139→98");
        let tome: Vec<usize> = (0..13).map(|l| 197 - 13 * l).collect();
        assert_eq!(token_path(&tome), "197→184→171→…→41");
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(4_608_338_304), "4,608,338,304");
        assert_eq!(thousands(7), "7");
        assert_eq!(quantity(4_608_338_304), "4.61 G");
        assert_eq!(quantity(583_000_000), "583 M");
        assert_eq!(quantity(12), "12");
        assert_eq!(three_digits(0.0123), "0.012");
        assert_eq!(percent(0.5884), "58.8 %");
    }

    #[test]
    fn tables_line_up() {
        let mut table = Table::new([("name", Align::Left), ("n", Align::Right)]);
        table.row(["a→b".to_owned(), "10".to_owned()]);
        table.row(["none".to_owned(), "7".to_owned()]);
        let mut text = Vec::new();
        table.write(&mut text).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "name   n\na→b   10\nnone   7\n");
    }
}
