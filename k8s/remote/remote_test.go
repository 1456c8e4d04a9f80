package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

// fake is an agent that answers commands by their first two words.
type fake struct {
	name    string
	answers map[string]func(stdin string, stdout, stderr io.Writer) error
	asked   []string
}

func (f *fake) String() string { return f.name }

func (f *fake) Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	f.asked = append(f.asked, strings.Join(args, " "))
	in := ""
	if stdin != nil {
		text, err := io.ReadAll(stdin)
		if err != nil {
			return err
		}
		in = string(text)
	}
	answer := f.answers[strings.Join(args[:2], " ")]
	if answer == nil {
		return fmt.Errorf("nobody has thought of %q", args)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return answer(in, stdout, stderr)
}

const secret = "cm1.AAAABBBBCCCCDDDDEEEE"

func agents(connect error) (from, to *fake) {
	to = &fake{name: "west", answers: map[string]func(string, io.Writer, io.Writer) error{
		"token create": func(_ string, out, _ io.Writer) error {
			_, err := fmt.Fprintf(out, `{"token":%q,"id":"tid"}`, secret)
			return err
		},
		"token delete": func(string, io.Writer, io.Writer) error { return nil },
	}}
	from = &fake{name: "east", answers: map[string]func(string, io.Writer, io.Writer) error{
		"connect -": func(in string, out, _ io.Writer) error {
			if in != secret+"\n" {
				return errors.New("no token on standard input")
			}
			fmt.Fprintln(out, "connected")
			return connect
		},
	}}
	return from, to
}

func TestConnect(t *testing.T) {
	from, to := agents(nil)
	var out, errs bytes.Buffer
	if err := Connect(t.Context(), from, to, time.Minute, []string{"--isolated"}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	if out.String() != "connected\n" || errs.Len() != 0 {
		t.Errorf("said %q and %q", out.String(), errs.String())
	}
	if !slices.Equal(from.asked, []string{"connect - --isolated"}) || !slices.Equal(to.asked, []string{"token create --output=json --ttl=1m0s"}) {
		t.Errorf("asked %q and %q", from.asked, to.asked)
	}
}

// TestConnectThatFails leaves no token that somebody could use.
func TestConnectThatFails(t *testing.T) {
	for _, why := range []error{&ExitError{1}, errors.New("the pod has gone")} {
		from, to := agents(why)
		err := Connect(t.Context(), from, to, time.Minute, nil, io.Discard, io.Discard)
		if !errors.Is(err, why) || strings.Contains(err.Error(), secret) {
			t.Errorf("got %v, want %v", err, why)
		}
		if len(to.asked) != 2 || to.asked[1] != "token delete tid" {
			t.Errorf("asked %q", to.asked)
		}
		to.answers["token delete"] = func(string, io.Writer, io.Writer) error { return errors.New("away") }
		if err := Connect(t.Context(), from, to, time.Minute, nil, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "tid") {
			t.Errorf("a token that is left: %v", err)
		}
	}
}

func TestConnectWithoutAToken(t *testing.T) {
	from, to := agents(nil)
	to.answers["token create"] = func(_ string, _, errs io.Writer) error {
		fmt.Fprintln(errs, "error: the store does not answer")
		return &ExitError{1}
	}
	err := Connect(t.Context(), from, to, time.Minute, nil, io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "the store does not answer") || len(from.asked) != 0 {
		t.Errorf("got %v, and asked %q", err, from.asked)
	}
	to.answers["token create"] = func(_ string, out, _ io.Writer) error { fmt.Fprintln(out, secret); return nil }
	if err := Connect(t.Context(), from, to, time.Minute, nil, io.Discard, io.Discard); err == nil || strings.Contains(err.Error(), secret) {
		t.Errorf("got %v", err)
	}
}
