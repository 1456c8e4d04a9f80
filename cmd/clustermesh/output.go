package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"causeway/agent/api"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// format is the value of -o.
type format string

const (
	formatTable format = "table"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "table|json|yaml" }

func (f *format) Set(s string) error {
	switch format(s) {
	case formatTable, formatJSON, formatYAML:
		*f = format(s)
		return nil
	}
	return fmt.Errorf("must be table, json or yaml")
}

// outputFlag gives a command -o.
func outputFlag(cmd *cobra.Command, f *format) {
	cmd.Flags().VarP(f, "output", "o", "how to print it")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(
		[]string{string(formatTable), string(formatJSON), string(formatYAML)}, cobra.ShellCompDirectiveNoFileComp))
}

// printer writes text for people: plain, or in colour on a terminal unless NO_COLOR is set.
type printer struct {
	w      io.Writer
	colour bool
	now    time.Time
}

func (e *env) printer() *printer {
	return &printer{w: e.out, colour: e.terminal && e.getenv("NO_COLOR") == "", now: e.now()}
}

// The few colours there are: what needs a look stands out, what is well does not.
const (
	bold   = "\x1b[1m"
	red    = "\x1b[31m"
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	faint  = "\x1b[2m"
	plain  = "\x1b[0m"
)

func (p *printer) paint(colour, s string) string {
	if !p.colour || colour == "" {
		return s
	}
	return colour + s + plain
}

func (p *printer) printf(format string, args ...any) { fmt.Fprintf(p.w, format, args...) }

// table is rows under a header. The cells of one column are coloured by what they say.
type table struct {
	header []string
	rows   [][]string
	status int // that column
}

// newTable returns a table whose last column is the coloured one.
func newTable(header ...string) *table { return &table{header: header, status: len(header) - 1} }

// add appends a row; what came from elsewhere can't break out of its cell.
func (t *table) add(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		if row[i] = printable(fmt.Sprint(c)); row[i] == "" {
			row[i] = "-"
		}
	}
	t.rows = append(t.rows, row)
}

// table writes t aligned; of an empty one there is the header.
func (p *printer) table(t *table) {
	widths := make([]int, len(t.header))
	for _, row := range append(t.rows, t.header) {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	p.printf("%s\n", p.paint(bold, strings.Join(padded(t.header, widths), "  ")))
	for _, row := range t.rows {
		cells := padded(row, widths)
		cells[t.status] = p.paint(colourOf(row[t.status]), cells[t.status])
		p.printf("%s\n", strings.Join(cells, "  "))
	}
}

// padded returns cells filled up with blanks to their widths, but the last one, which nothing follows.
func padded(cells []string, widths []int) []string {
	out := make([]string, len(cells))
	for i, cell := range cells {
		if out[i] = cell; i < len(cells)-1 {
			out[i] += strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
		}
	}
	return out
}

// colourOf returns the colour of a status word.
func colourOf(status string) string {
	switch word, _, _ := strings.Cut(status, ":"); word {
	case "error", "closed", "away", "dead", "suspect", "unreachable", peerNotConnected, certExpired, certNotYet:
		return red
	case "pending", "syncing", "agent-down", "control-plane-down", peerJoining, peerLeft, certExpiresSoon:
		return yellow
	}
	return ""
}

// printable returns s on one line, without characters that would drive a terminal.
func printable(s string) string {
	if strings.IndexFunc(s, unprintable) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n', r == '\t':
			b.WriteByte(' ')
		case unprintable(r):
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// rowStatus returns a row's status in a word, with the reason if it is an error.
func rowStatus(s api.RowStatus) string {
	if s.Error != "" {
		return s.Kind + ": " + s.Error
	}
	return s.Kind
}

// age returns how long ago t was, to a precision that a person cares for.
func (p *printer) age(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return duration(p.now.Sub(t))
}

// until returns how far off t is, before or behind.
func (p *printer) until(t time.Time) string {
	switch d := t.Sub(p.now); {
	case t.IsZero():
		return "never"
	case d < 0:
		return duration(-d) + " ago"
	default:
		return "in " + duration(d)
	}
}

func duration(d time.Duration) string {
	switch {
	case d < time.Minute:
		return strings.TrimSuffix(d.Round(100*time.Millisecond).String(), ".0s")
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Round(time.Second).String(), "0s")
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// encode writes v as a document of f, which isn't formatTable. A stream has one JSON
// document a line, or YAML documents apart.
func encode(w io.Writer, f format, v any, stream bool) error {
	switch {
	case f == formatYAML:
		doc, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		if stream {
			doc = append([]byte("---\n"), doc...)
		}
		_, err = w.Write(doc)
		return err
	case stream:
		return json.NewEncoder(w).Encode(v)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
