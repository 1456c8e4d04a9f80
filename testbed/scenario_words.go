package testbed

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"causeway/identity"
)

// phrase is a sentence of the scenario language. In its pattern words in capitals stand for something, and what is in
// brackets may be left out.
type phrase[T any] struct {
	pattern string
	make    func(arguments, *Setup) (T, error)
}

// arguments are what stood for the words in capitals, in their order; what was left out is "".
type arguments []string

// splitWords splits a line at blanks, but not within double quotes, and leaves out the comment that "#" begins.
func splitWords(line string) (words []string, err error) {
	rest := strings.TrimSpace(line)
	for rest != "" && rest[0] != '#' {
		end := strings.IndexAny(rest, " \t")
		if rest[0] == '"' {
			quoted, qerr := strconv.QuotedPrefix(rest)
			if qerr != nil {
				return nil, fmt.Errorf("the text %s has no end: close it with \"", rest)
			}
			end = len(quoted)
		}
		if end < 0 {
			end = len(rest)
		}
		words = append(words, rest[:end])
		rest = strings.TrimSpace(rest[end:])
	}
	return words, nil
}

// splitConditions splits at ";" outside of quotes.
func splitConditions(text string) (parts []string) {
	quoted, start := false, 0
	for i, c := range text {
		switch {
		case c == '"' && (i == 0 || text[i-1] != '\\'):
			quoted = !quoted
		case c == ';' && !quoted:
			parts = append(parts, text[start:i])
			start = i + 1
		}
	}
	return append(parts, text[start:])
}

// variants writes out a pattern: with and without each part in brackets.
func variants(pattern string) []string {
	before, rest, ok := strings.Cut(pattern, "[")
	if !ok {
		return []string{pattern}
	}
	option, after, _ := strings.Cut(rest, "]")
	var all []string
	for _, tail := range variants(after) {
		// A part that is left out leaves its arguments empty.
		all = append(all, before+option+tail, before+leftOut(option)+tail)
	}
	return all
}

const omitted = "\x00"

func leftOut(option string) string {
	var gaps []string
	for word := range strings.FieldsSeq(option) {
		if isPlaceholder(word) {
			gaps = append(gaps, omitted)
		}
	}
	return strings.Join(gaps, " ")
}

func isPlaceholder(word string) bool { return word == strings.ToUpper(word) }

// match compares words with a pattern without brackets.
func match(pattern string, words []string) (arguments, bool) {
	var args arguments
	for want := range strings.FieldsSeq(pattern) {
		switch {
		case want == omitted:
			args = append(args, "")
			continue
		case len(words) == 0:
			return nil, false
		case want == "STATES":
			n := alternatives(words)
			args, words = append(args, strings.Join(words[:n], " ")), words[n:]
			continue
		case isPlaceholder(want):
			args = append(args, words[0])
		case want != words[0]:
			return nil, false
		}
		words = words[1:]
	}
	return args, len(words) == 0
}

// alternatives counts the words of "A or B or C" at the beginning.
func alternatives(words []string) int {
	n := 1
	for n+1 < len(words) && words[n] == "or" {
		n += 2
	}
	return n
}

// isPhrase tells whether words begin like one of the phrases.
func isPhrase[T any](phrases []phrase[T], words []string) bool {
	return slices.ContainsFunc(phrases, func(p phrase[T]) bool { return p.begins(words[0]) })
}

// begins tells whether the phrase may begin with a word. What stands for something at its beginning is a number.
func (p phrase[T]) begins(word string) bool {
	first, _, _ := strings.Cut(p.pattern, " ")
	if isPlaceholder(first) {
		_, err := strconv.Atoi(word)
		return err == nil
	}
	return first == word
}

// parsePhrase finds the phrase that words are. The error says which there are that begin alike.
func parsePhrase[T any](phrases []phrase[T], words []string, s *Setup) (result T, err error) {
	var alike []string
	for _, p := range phrases {
		for _, pattern := range variants(p.pattern) {
			if args, ok := match(pattern, words); ok {
				return p.make(args, s)
			}
		}
		if p.begins(words[0]) {
			alike = append(alike, p.pattern)
		}
	}
	text := strings.Join(words, " ")
	if len(alike) == 0 {
		return result, fmt.Errorf("%q is no step that is known: no step begins with %q; docs/scenarios.md has them all", text, words[0])
	}
	return result, fmt.Errorf("%q is no step that is known; write: %s", text, strings.Join(alike, ", or: "))
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is no duration; write it like 300ms, 2s or 10m", s)
	}
	return d, nil
}

// number reads what stands before a unit, as in "5%" and "50/s".
func number(s, unit string) (float64, error) {
	digits, ok := strings.CutSuffix(s, unit)
	n, err := strconv.ParseFloat(digits, 64)
	if !ok || err != nil || !(n > 0) {
		return 0, fmt.Errorf("%q must be a number and %q, like 5%[2]s", s, unit)
	}
	return n, nil
}

func (s *Setup) checkCluster(name string) error {
	if !slices.Contains(s.clusters(), name) {
		return fmt.Errorf("there is no cluster %q in this scenario; it has %s", name, s.Clusters)
	}
	return nil
}

func (s *Setup) node(text string) (identity.NodeName, error) {
	n, err := ParseNode(text)
	if err != nil {
		return n, err
	}
	return n, errors.Join(s.checkCluster(n.Cluster), s.checkNode(n.Node))
}

func (s *Setup) checkNode(name string) error {
	for n := 1; n <= s.Nodes; n++ {
		if name == nodeName(n) {
			return nil
		}
	}
	return fmt.Errorf("there is no node %q in this scenario; each cluster has node1 to node%d", name, s.Nodes)
}

// scope is a part of a bed: all of it, a cluster or a node.
type scope struct{ cluster, node string }

// scope reads CLUSTER, CLUSTER/NODE, or nothing for everything.
func (s *Setup) scope(text string) (scope, error) {
	if text == "" {
		return scope{}, nil
	}
	if !strings.Contains(text, "/") {
		return scope{cluster: text}, s.checkCluster(text)
	}
	n, err := s.node(text)
	return scope{n.Cluster, n.Node}, err
}

func (s scope) has(n identity.NodeName) bool {
	return (s.cluster == "" || s.cluster == n.Cluster) && (s.node == "" || s.node == n.Node)
}

func (s scope) String() string { return strings.Trim(s.cluster+"/"+s.node, "/") }

// places checks the two that a fault is between.
func (s *Setup) places(a, b string) error {
	err := cmp.Or(s.place(a), s.place(b))
	if err == nil && a == b {
		err = fmt.Errorf("%s and %s are the same place; name two", a, b)
	}
	return err
}

// place checks what a partition is between: also CLUSTER/kvstore.
func (s *Setup) place(text string) error {
	if cluster, ok := strings.CutSuffix(text, "/"+kvstoreName); ok {
		return s.checkCluster(cluster)
	}
	_, err := s.scope(text)
	return err
}
