package testbed

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Scenario says what happens to a bed, and what is expected then. It is read from a file with one step a
// line, in the language of docs/scenarios.md.
type Scenario struct {
	// Name of the file, for messages.
	Name  string
	Setup Setup
	steps []step
}

// Setup is the bed that a scenario runs on. Scenarios with the same one can share a bed.
type Setup struct {
	Clusters string // names, with blanks between
	Nodes    int    // per cluster
	Service  string // with a server on every node, and a client in every cluster
}

// Steps returns how many steps there are.
func (s *Scenario) Steps() int { return len(s.steps) }

// mode says when the conditions of a step are looked at.
type mode int

const (
	doing    mode = iota // no conditions, an action
	now                  // once
	within               // until they hold, at most so long after the last action
	lasting              // all the time for so long
	fromHere             // all the time until upToHere, or the end
	upToHere
)

// step is a line of a scenario.
type step struct {
	line int
	text string
	mode mode
	// duration of within and lasting.
	duration   time.Duration
	action     action
	conditions []condition
}

// StepError says which step of a scenario failed, what it expected and what there was.
type StepError struct {
	File string
	Line int
	// Step is the line's text.
	Step string
	// Actual says what there was instead of what Step expects; empty if Step could not be done, because of Err.
	Actual string
	Err    error
}

func (e *StepError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("%s:%d: %s: %v", e.File, e.Line, e.Step, e.Err)
	}
	return fmt.Sprintf("%s:%d: expected %q, but %s", e.File, e.Line, e.Step, e.Actual)
}

func (e *StepError) Unwrap() error { return e.Err }

// ParseScenario reads a scenario; name is only for messages. A soak takes the longer ones of its durations.
// The error names the line, and what could stand there.
func ParseScenario(name string, text []byte, soak bool) (*Scenario, error) {
	p := &parser{scenario: &Scenario{Name: name}, soak: soak}
	number := 0
	for line := range strings.Lines(string(text)) {
		number++
		if err := p.line(number, line); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, number, err)
		}
	}
	if err := p.missing(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return p.scenario, nil
}

// parser reads a scenario line by line.
type parser struct {
	scenario *Scenario
	soak     bool
}

// soakDuration is how a step says that it lasts longer in a soak: "15s, or 10m in a soak".
var soakDuration = regexp.MustCompile(`(\S+), or (\S+) in a soak`)

func (p *parser) line(number int, text string) error {
	words, err := splitWords(text)
	if err != nil || len(words) == 0 {
		return err
	}
	told := strings.Join(words, " ")
	if words, err = p.choose(told); err != nil {
		return err
	}
	if declared, err := p.declare(words); declared {
		return err
	}
	if err := p.missing(); err != nil {
		return err
	}
	st, err := p.step(words)
	st.line, st.text = number, told
	p.scenario.steps = append(p.scenario.steps, st)
	return err
}

// choose takes one of two durations where a line has both.
func (p *parser) choose(text string) ([]string, error) {
	for _, m := range soakDuration.FindAllStringSubmatch(text, -1) {
		for _, d := range m[1:] {
			if _, err := parseDuration(strings.TrimSuffix(d, ":")); err != nil {
				return nil, err
			}
		}
	}
	take := "$1"
	if p.soak {
		take = "$2"
	}
	return splitWords(soakDuration.ReplaceAllString(text, take))
}

// declare reads a line that describes the bed; false if it is none.
func (p *parser) declare(words []string) (bool, error) {
	s := &p.scenario.Setup
	var err error
	switch words[0] {
	case "clusters":
		s.Clusters = strings.Join(words[1:], " ")
		if len(words) == 1 {
			err = errors.New("name the clusters, like: clusters east west")
		}
	case "nodes":
		if len(words) == 2 {
			s.Nodes, err = strconv.Atoi(words[1])
		}
		if err != nil || s.Nodes < 1 {
			err = errors.New("say how many nodes each cluster has, like: nodes 3")
		}
	case "service":
		if len(words) != 5 || strings.Join(words[2:], " ") != "on every node" {
			return true, errors.New("write: service NAME on every node")
		}
		s.Service = words[1]
		err = validateName("service", s.Service, maxPodName)
	default:
		return false, nil
	}
	if len(p.scenario.steps) > 0 {
		err = fmt.Errorf("%q describes the bed, and must be above all steps", words[0])
	}
	return true, err
}

// missing tells what the description of the bed lacks.
func (p *parser) missing() error {
	s := p.scenario.Setup
	for what, lacks := range map[string]bool{"clusters NAME…": s.Clusters == "", "nodes N": s.Nodes == 0, "service NAME on every node": s.Service == ""} {
		if lacks {
			return fmt.Errorf("the bed is not described: write %q above the first step", what)
		}
	}
	o := Options{Clusters: s.clusters(), Nodes: s.Nodes}
	l, err := newLayout(ScenarioDir)
	if err != nil {
		return err
	}
	return o.validate(l)
}

func (s *Setup) clusters() []string { return strings.Fields(s.Clusters) }

// step reads a line that is a step.
func (p *parser) step(words []string) (st step, err error) {
	text := strings.Join(words, " ")
	prefix, rest, expects := strings.Cut(text, ": ")
	lead := strings.Fields(prefix)
	switch {
	case text == "up to here":
		return step{mode: upToHere}, p.checkOpen()
	case expects && prefix == "from here on":
		st.mode = fromHere
	case expects && len(lead) == 2 && lead[0] == "within":
		st.mode = within
	case expects && len(lead) == 2 && lead[0] == "for":
		st.mode = lasting
	default:
		return p.plain(words)
	}
	if st.mode != fromHere {
		if st.duration, err = parseDuration(lead[1]); err != nil {
			return st, err
		}
	}
	st.conditions, err = p.conditions(rest)
	if err == nil && slices.ContainsFunc(st.conditions, func(c condition) bool { return c.needs&lookTraffic != 0 }) {
		err = errors.New("requests are counted when the traffic has ended: write this without a time, below: stop traffic")
	}
	return st, err
}

func (p *parser) checkOpen() error {
	for _, st := range slices.Backward(p.scenario.steps) {
		switch st.mode {
		case fromHere:
			return nil
		case upToHere:
			return errors.New(`there is no "from here on:" above that it would end`)
		}
	}
	return errors.New(`there is no "from here on:" above that it would end`)
}

// plain reads an action, or conditions that are looked at once.
func (p *parser) plain(words []string) (st step, err error) {
	if isPhrase(actions, words) {
		st.action, err = parsePhrase(actions, words, &p.scenario.Setup)
		return st, err
	}
	st.mode = now
	st.conditions, err = p.conditions(strings.Join(words, " "))
	return st, err
}

// conditions reads one or several, with ";" between.
func (p *parser) conditions(text string) (list []condition, err error) {
	for _, part := range splitConditions(text) {
		words, err := splitWords(part)
		if err != nil {
			return nil, err
		}
		if len(words) == 0 {
			return nil, errors.New(`a condition is missing next to ";" or ":"`)
		}
		c, err := parsePhrase(conditions, words, &p.scenario.Setup)
		if err != nil {
			return nil, err
		}
		c.text = strings.Join(words, " ")
		list = append(list, c)
	}
	return list, nil
}
