// Package remote runs clustermesh in agents' pods, by the API server's exec, for a person whose machine reaches no agent's socket. exec.go is the way there.
package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Agent runs clustermesh commands beside an agent.
type Agent interface {
	// Run returns when the command has ended; *ExitError if that was not with 0.
	Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error
	// String says which agent, for messages.
	String() string
}

// ExitError is a command's exit code that is not 0.
type ExitError struct{ Code int }

func (e *ExitError) Error() string { return fmt.Sprintf("exit code %d", e.Code) }

// tidyTimeout bounds the attempt to make a token worthless that was not used.
const tidyTimeout = 10 * time.Second

// token is what "clustermesh token create -o json" says, as far as it is needed.
type token struct {
	Text string `json:"token"`
	ID   string `json:"id"`
}

// Connect joins the cluster of one agent with that of another: a token is made at to, and used at from with these arguments of "clustermesh connect". It is in no
// argument and in nothing that is written to stdout or stderr, which get what the connect says. A token that was not used is made worthless.
func Connect(ctx context.Context, from, to Agent, ttl time.Duration, args []string, stdout, stderr io.Writer) error {
	var made, said bytes.Buffer
	create := []string{"token", "create", "--output=json", "--ttl=" + ttl.String()}
	if err := to.Run(ctx, create, nil, &made, &said); err != nil {
		return fmt.Errorf("making a token at %s: %w: %s", to, err, strings.TrimSpace(said.String()))
	}
	var t token
	if err := json.Unmarshal(made.Bytes(), &t); err != nil || t.Text == "" || t.ID == "" {
		return fmt.Errorf("making a token at %s: the answer is none: has it the version of this program?", to)
	}
	err := from.Run(ctx, append([]string{"connect", "-"}, args...), strings.NewReader(t.Text+"\n"), stdout, stderr)
	if err == nil {
		return nil
	}
	// Whatever has ended the connect, the token must not outlive it.
	tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTimeout)
	defer cancel()
	said.Reset()
	if forget := to.Run(tidy, []string{"token", "delete", t.ID}, nil, io.Discard, &said); forget != nil && !strings.Contains(said.String(), "no token") {
		err = errors.Join(err, fmt.Errorf("the token %s at %s was not deleted, and holds for %s at most: %w: %s", t.ID, to, ttl, forget, strings.TrimSpace(said.String())))
	}
	var exit *ExitError
	if errors.As(err, &exit) {
		return err
	}
	return fmt.Errorf("connecting at %s: %w", from, err)
}
