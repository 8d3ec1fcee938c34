//! A bench's results as a picture (SVG): for each phase and subject the median,
//! the quartiles and what 95 of a hundred stay below, on a logarithmic axis,
//! for phases differ by orders of magnitude.

use std::fmt::Write as _;

use super::report::{Report, Row};

/// Colours that people tell apart who see fewer of them (Okabe and Ito).
const COLOURS: [&str; 6] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
];
const LEFT: f64 = 150.0;
const PLOT: f64 = 470.0;
const WIDTH: f64 = 860.0;
const LINE: f64 = 20.0;
const GAP: f64 = 12.0;

/// A logarithmic axis.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// From a round number below all values to one above.
    fn around(rows: &[Row]) -> Self {
        let values = rows.iter().flat_map(|row| row.figures.all());
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| *value > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        if !low.is_finite() {
            (low, high) = (1.0, 10.0);
        }
        Self {
            low: 10f64.powf((low.log10() * 3.0).floor() / 3.0),
            high: 10f64.powf((high.log10() * 3.0 + 0.2).ceil() / 3.0),
        }
    }

    fn x(&self, value: f64) -> f64 {
        let part = (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        LEFT + part.min(1.0) * PLOT
    }

    /// 1, 2 and 5 of each decade; with many decades only 1.
    fn ticks(&self) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        let steps: &[f64] = if decades > 3.0 {
            &[1.0]
        } else {
            &[1.0, 2.0, 5.0]
        };
        let first = self.low.log10().floor() as i32;
        let last = self.high.log10().ceil() as i32;
        (first..=last)
            .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)))
            .filter(|tick| (self.low..=self.high).contains(tick))
            .collect()
    }
}

/// The picture.
pub(super) fn svg(report: &Report) -> String {
    let mut phases: Vec<&str> = Vec::new();
    let mut subjects: Vec<&str> = Vec::new();
    for row in &report.rows {
        for (list, name) in [(&mut phases, &row.phase), (&mut subjects, &row.subject)] {
            if !list.contains(&name.as_str()) {
                list.push(name);
            }
        }
    }
    let axis = Axis::around(&report.rows);
    let unit = report.rows.first().map_or("ms", |row| row.figures.unit());
    let facts = report.host.text();
    let notes: Vec<&str> = facts.lines().collect();
    let top = 34.0 + 14.0 * notes.len() as f64 + 30.0;
    let mut body = String::new();
    let mut y = top;
    for phase in &phases {
        let rows: Vec<&Row> = report
            .rows
            .iter()
            .filter(|row| row.phase == *phase)
            .collect();
        text(&mut body, LEFT - 10.0, y + 14.0, "end", "phase", phase);
        for row in rows {
            let colour = subjects.iter().position(|name| *name == row.subject);
            let colour = COLOURS[colour.unwrap_or(0) % COLOURS.len()];
            mark(&mut body, &axis, row, y + LINE / 2.0, colour);
            let ratio = report
                .ratios
                .iter()
                .find(|ratio| ratio.phase == *phase && ratio.to == row.subject);
            let mut label = format!("{} {unit}", figure(row.figures.all()[1]));
            if let Some(ratio) = ratio {
                let _ = write!(
                    label,
                    "   x {:.2} ({:.2} to {:.2})",
                    ratio.p50, ratio.low, ratio.high
                );
            }
            text(&mut body, LEFT + PLOT + 12.0, y + 14.0, "start", "", &label);
            y += LINE;
        }
        y += GAP;
    }
    let bottom = y;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>.title{{font-size:16px;font-weight:bold}}.note{{font-size:10.5px;fill:#555}}\
         .phase{{font-weight:bold}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        height = bottom + 58.0
    );
    let title = format!("bench {}", report.bench);
    text(&mut svg, 16.0, 26.0, "start", "title", &title);
    for (at, note) in notes.iter().enumerate() {
        let y = 44.0 + 14.0 * at as f64;
        text(&mut svg, 16.0, y, "start", "note", note);
    }
    let mut x = LEFT;
    for (subject, colour) in subjects.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{colour}\"/>",
            top - 20.0
        );
        text(&mut svg, x + 10.0, top - 16.0, "start", "", subject);
        x += 40.0 + 7.0 * subject.len() as f64;
    }
    for tick in axis.ticks() {
        let x = axis.x(tick);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\" stroke=\"#ddd\"/>"
        );
        text(&mut svg, x, bottom + 14.0, "middle", "note", &figure(tick));
    }
    text(&mut svg, LEFT + PLOT, bottom + 28.0, "end", "note", unit);
    let first = report.ratios.first().map_or("", |ratio| &ratio.of);
    let legend = match first {
        "" => "dot: median; thick: quartiles; thin: 95th percentile".to_owned(),
        first => format!(
            "dot: median; thick: quartiles; thin: 95th percentile; x: {first} against that line, \
             median of the rounds (quartiles)"
        ),
    };
    text(&mut svg, 16.0, bottom + 46.0, "start", "note", &legend);
    svg + &body + "</svg>\n"
}

fn mark(svg: &mut String, axis: &Axis, row: &Row, y: f64, colour: &str) {
    let [p25, p50, p75, p95, _] = row.figures.all().map(|value| axis.x(value));
    for (from, to, width) in [(p25, p95, 1.5), (p25, p75, 6.0)] {
        let _ = writeln!(
            svg,
            "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" \
             stroke=\"{colour}\" stroke-width=\"{width}\" stroke-opacity=\"0.55\"/>"
        );
    }
    let _ = writeln!(
        svg,
        "<circle cx=\"{p50:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
    let text = text
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
    );
}

/// Three digits are what was measured.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{}", (value * 100.0).round() / 100.0),
        value => format!("{}", (value * 1000.0).round() / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let text = [1234.5, 12.345, 1.2345, 0.01234].map(figure);
        assert_eq!(text, ["1234", "12.3", "1.23", "0.012"]);
    }

    #[test]
    fn the_axis_holds_all_values() {
        let axis = Axis {
            low: 1.0,
            high: 1000.0,
        };
        let x = [1.0, 1000.0, 5000.0].map(|value| axis.x(value));
        assert_eq!(x, [LEFT, LEFT + PLOT, LEFT + PLOT]);
        assert_eq!(axis.ticks().len(), 10);
    }
}
