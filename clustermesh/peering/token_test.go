package peering

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"
)

func sampleToken() Token {
	t := newToken()
	t.Mesh, t.Cluster, t.Endpoints = "causeway", "west", []string{"172.29.2.11:7958", "[fd00::1]:7958", "west.example:7958"}
	t.Authority[0], t.Expires = 7, time.Date(2026, 10, 1, 12, 0, 0, 0, time.UTC)
	return t
}

func TestTokenIsReadAsItWasWritten(t *testing.T) {
	want := sampleToken()
	for _, around := range []string{"%s", "  %s\r\n", "\n\n\t%s \n"} {
		got, err := ParseToken(fmt.Sprintf(around, want.String()))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

func TestTokenIsRefused(t *testing.T) {
	text := sampleToken().String()
	sealed := func(body string) string {
		sum := sha256.Sum256([]byte(body))
		return TokenPrefix + base64.RawURLEncoding.EncodeToString(append([]byte(body), sum[:4]...))
	}
	bad := func(change func(*Token)) string {
		token := sampleToken()
		change(&token)
		return token.String()
	}
	for _, tc := range []struct{ text, want string }{
		{"", "not a token"},
		{"hello", "not a token"},
		{"CM1." + text[4:], "not a token"},
		{text[:3], "not a token"},
		{"cm2." + text[4:], "newer version"},
		{"cm12.x", "newer version"},
		{TokenPrefix, "cut or mistyped"},
		{text[:len(text)-1], "cut or mistyped"},
		{text[:40], "cut or mistyped"},
		{text + "A", "cut or mistyped"},
		{text + text, "cut or mistyped"},
		{text[:50] + "!" + text[51:], "cut or mistyped"},
		{text[:50] + "\n" + text[50:], "as one line"},
		{text[:50] + " " + text[50:], "as one line"},
		{TokenPrefix + strings.Repeat("A", maxToken), "more than"},
		{sealed("\x80"), "does not hold what a token does"},
		{sealed("anything"), "does not hold what a token does"},
		{bad(func(t *Token) { t.Cluster = "West\x1b[31m" }), "DNS label"},
		{bad(func(t *Token) { t.Mesh = "" }), "mesh name"},
		{bad(func(t *Token) { t.Secret = []byte("short") }), "wrong length"},
		{bad(func(t *Token) { t.ID = "aaaa" }), "wrong length"},
		{bad(func(t *Token) { t.Endpoints = nil }), "0 endpoints"},
		{bad(func(t *Token) { t.Endpoints = make([]string, 9) }), "9 endpoints"},
		{bad(func(t *Token) { t.Endpoints = []string{"west"} }), "host:port"},
		{bad(func(t *Token) { t.Endpoints = []string{"west:0"} }), "1 to 65535"},
		{bad(func(t *Token) { t.Endpoints = []string{"a\nb:80"} }), "host:port"},
		{bad(func(t *Token) { t.Expires = time.Unix(1, 0) }), "plausible"},
	} {
		_, err := ParseToken(tc.text)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%.60q: got %v, want %q", tc.text, err, tc.want)
		}
	}
}

// Whatever single character is mistyped, it is noticed, and the error shows nothing of the token.
func TestTokenMistyped(t *testing.T) {
	token := sampleToken()
	text := token.String()
	for i := len(TokenPrefix); i < len(text); i++ {
		for _, c := range "Ab9-_" {
			typed := text[:i] + string(c) + text[i+1:]
			if typed == text {
				continue
			}
			_, err := ParseToken(typed)
			if err == nil || strings.Contains(err.Error(), text[10:20]) {
				t.Fatalf("character %d: %v", i, err)
			}
		}
	}
}

func TestTokenIsNotLogged(t *testing.T) {
	var out bytes.Buffer
	token := sampleToken()
	slog.New(slog.NewTextHandler(&out, nil)).Info("made", "token", token)
	if text := out.String(); strings.Contains(text, TokenPrefix) || !strings.Contains(text, token.ID) {
		t.Errorf("logged %q", text)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(sampleToken().String())
	f.Add("cm1.")
	f.Add("cm2.AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		if token.String() != strings.TrimSpace(text) {
			t.Errorf("%q is read, and written as %q", text, token.String())
		}
	})
}

// FuzzToken reads what has a valid checksum, which FuzzParseToken hardly ever finds.
func FuzzToken(f *testing.F) {
	raw, _ := base64.RawURLEncoding.DecodeString(sampleToken().String()[len(TokenPrefix):])
	f.Add(raw[:len(raw)-checksumSize])
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		text := TokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, sum[:checksumSize]...))
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		again, err := ParseToken(token.String())
		if err != nil || !reflect.DeepEqual(again, token) {
			t.Errorf("%+v is read as %+v: %v", token, again, err)
		}
	})
}
