//! How names, shapes and values from files nobody has vetted appear in messages.

/// `text` on one line, shortened: file contents may hold anything, messages are one line.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 120;
    let mut out = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == LONGEST {
            out.push_str("...");
            break;
        }
        if character.is_control() {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

/// `(3, 224, 224)`.
pub(super) fn shape(extents: &[usize]) -> String {
    const LONGEST: usize = 8;
    let mut parts: Vec<String> = extents.iter().take(LONGEST).map(usize::to_string).collect();
    if extents.len() > LONGEST {
        parts.push("...".into());
    }
    format!("({})", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_whatever_the_file_says() {
        assert_eq!(shown("a\nb"), "a\\nb");
        assert!(shown(&"x".repeat(1000)).len() < 130);
        assert_eq!(shape(&[1, 2]), "(1, 2)");
        assert_eq!(shape(&[0; 9]), "(0, 0, 0, 0, 0, 0, 0, 0, ...)");
    }
}
