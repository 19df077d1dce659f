//! Bars, as SVG.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const LEFT: f64 = 130.0;
const BAR: f64 = 18.0;
const COLOURS: [&str; 3] = ["#9aa5b1", "#2f6fde", "#7fb069"];

/// Groups of bars, each with a scale of its own.
#[derive(Default)]
pub struct Chart {
    body: String,
    y: f64,
}

impl Chart {
    /// Adds a group.
    pub fn group(&mut self, title: &str, bars: &[(&str, f64)]) {
        let most = bars.iter().map(|bar| bar.1).fold(f64::MIN_POSITIVE, f64::max);
        self.y += 26.0;
        self.text(10.0, "font-weight=\"bold\"", title);
        for ((name, value), colour) in bars.iter().zip(COLOURS) {
            self.y += 4.0;
            let width = (WIDTH - LEFT - 90.0) * value / most;
            let _ = writeln!(
                self.body,
                "<rect x=\"{LEFT}\" y=\"{}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
                self.y
            );
            self.y += BAR - 4.0;
            self.text(20.0, "", name);
            self.text(LEFT + width + 6.0, "", &format!("{value:.1}"));
            self.y += 4.0;
        }
    }

    fn text(&mut self, x: f64, attributes: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(self.body, "<text x=\"{x:.1}\" y=\"{:.1}\" {attributes}>{text}</text>", self.y);
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let height = self.y + 16.0;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}</svg>\n",
            self.body
        )
    }
}
