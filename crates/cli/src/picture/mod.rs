//! Pictures as SVG, made by nothing but this: they open in any browser, without a network.

pub(crate) mod map;

use std::fmt::{self, Write as _};

/// A picture that is being drawn; lengths in pixels.
#[derive(Debug, Default)]
pub(crate) struct Svg {
    body: String,
}

/// Text that stands in XML as it is.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                // No control character but these is allowed in XML; none is wanted here. Nor are those that
                // turn the direction of a text.
                c if c.is_control()
                    || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
                    || matches!(c, '\u{fffe}' | '\u{ffff}') =>
                {
                    write!(f, "\\u{{{:x}}}", u32::from(c))?;
                }
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

impl Svg {
    // Writing to a String cannot fail.

    /// A box of a class.
    pub(crate) fn rect(&mut self, class: &str, [x, y, width, height]: [f64; 4], tip: &str) {
        let _ = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" \
             height=\"{height:.1}\" rx=\"3\">"
        );
        if !tip.is_empty() {
            let _ = write!(self.body, "<title>{}</title>", Escaped(tip));
        }
        self.body.push_str("</rect>\n");
    }

    /// A line of text; its place is the left end of its baseline.
    pub(crate) fn text(&mut self, class: &str, [x, y]: [f64; 2], text: &str) {
        let text = Escaped(text);
        let _ =
            writeln!(self.body, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
    }

    /// A curve from left to right.
    pub(crate) fn curve(&mut self, class: &str, [x0, y0]: [f64; 2], [x1, y1]: [f64; 2]) {
        let half = (x0 + x1) / 2.0;
        let _ = writeln!(
            self.body,
            "<path class=\"{class}\" d=\"M{x0:.1} {y0:.1}C{half:.1} {y0:.1} {half:.1} {y1:.1} {x1:.1} {y1:.1}\"/>"
        );
    }

    /// A straight line.
    pub(crate) fn line(&mut self, class: &str, [x0, y0]: [f64; 2], [x1, y1]: [f64; 2]) {
        let _ =
            writeln!(self.body, "<path class=\"{class}\" d=\"M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}\"/>");
    }

    /// The whole file.
    pub(crate) fn finish(self, title: &str, style: &str, [width, height]: [f64; 2]) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\">\n<title>{}</title>\n\
             <style>{style}</style>\n<rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n{}</svg>\n",
            Escaped(title),
            self.body
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_is_markup() {
        let mut svg = Svg::default();
        svg.text("t", [1.0, 2.0], "a<script>&\"\u{1b}\u{202e}б");
        let file = svg.finish("<x>", "", [10.0, 20.0]);
        assert!(file.contains(">a&lt;script&gt;&amp;&quot;\\u{1b}\\u{202e}б</text>"), "{file}");
        assert!(file.contains("<title>&lt;x&gt;</title>"), "{file}");
    }
}
