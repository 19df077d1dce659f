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

    /// Adds a line of text below a group.
    pub fn note(&mut self, text: &str) {
        self.y += 18.0;
        self.text(20.0, "font-style=\"italic\"", text);
        self.y += 4.0;
    }

    fn text(&mut self, x: f64, attributes: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(self.body, "<text x=\"{x:.1}\" y=\"{:.1}\" {attributes}>{text}</text>", self.y);
    }

    /// The picture.
    pub fn svg(&self) -> String {
        svg(self.y + 16.0, &self.body)
    }
}

/// Stages one after the other, on one scale.
#[derive(Default)]
pub struct Timeline(Vec<(String, f64, f64)>);

impl Timeline {
    /// Adds one, from when to when.
    pub fn stage(&mut self, name: &str, from: f64, to: f64) {
        self.0.push((name.to_owned(), from, to));
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let all = self.0.iter().map(|stage| stage.2).fold(f64::MIN_POSITIVE, f64::max);
        let x = |time: f64| LEFT + (WIDTH - LEFT - 90.0) * time / all;
        let mut chart = Chart::default();
        for ((name, from, to), colour) in self.0.iter().zip(COLOURS.into_iter().cycle()) {
            let (left, y) = (x(*from), chart.y + 4.0);
            let width = (x(*to) - left).max(1.0);
            let _ = writeln!(
                chart.body,
                "<rect x=\"{left:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
            );
            chart.y += BAR;
            chart.text(4.0, "", name);
            chart.text(left + width + 6.0, "", &format!("{:.1} ms", to - from));
            chart.y += 4.0;
        }
        chart.svg()
    }
}

fn svg(height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}
