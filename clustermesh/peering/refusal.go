package peering

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// refuse makes the error of a request: code and reason for programs, the sentence for people.
func refuse(code codes.Code, reason Refusal_Reason, format string, args ...any) error {
	made := status.New(code, fmt.Sprintf(format, args...))
	if with, err := made.WithDetails(&Refusal{Reason: reason}); err == nil {
		made = with
	}
	return made.Err()
}

// reasonOf returns what an answer gives as its reason.
func reasonOf(err error) Refusal_Reason {
	for _, detail := range status.Convert(err).Details() {
		if r, ok := detail.(*Refusal); ok {
			return r.Reason
		}
	}
	return Refusal_UNKNOWN
}

// remoteError is what a peer's agent has answered, or why it has not.
type remoteError struct {
	cluster string
	reason  Refusal_Reason
	code    codes.Code
	message string
}

func (e *remoteError) Error() string {
	switch e.code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return fmt.Sprintf("cluster %s does not answer: %s", e.cluster, e.message)
	case codes.Unimplemented:
		return fmt.Sprintf("cluster %s does not know the request, its Causeway is older or newer: %s", e.cluster, e.message)
	}
	return fmt.Sprintf("cluster %s: %s", e.cluster, e.message)
}

func (e *remoteError) Is(target error) bool { return target == ErrLeft && e.reason == Refusal_LEFT }

// fromPeer makes an error of what a cluster's agent has answered. What it says is shown to people, so it must not play tricks on their terminal.
func fromPeer(cluster string, err error) error {
	if err == nil {
		return nil
	}
	var already *remoteError
	if errors.As(err, &already) {
		return err
	}
	s := status.Convert(err)
	return &remoteError{cluster: cluster, reason: reasonOf(err), code: s.Code(), message: plain(s.Message())}
}

// maxSentence bounds what is shown of what another cluster says, in bytes.
const maxSentence = 1000

// plain returns text that another cluster sent, as one line that can be shown.
func plain(text string) string {
	if len(text) > maxSentence {
		text = text[:maxSentence] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}
