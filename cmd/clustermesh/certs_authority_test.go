package main

import (
	"bytes"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"causeway/identity/pki"
)

func TestCertsAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	var errs bytes.Buffer
	e := testEnv(io.Discard, &errs, nil)
	e.now = time.Now
	args := []string{"certs", "authority", "--cluster", "east", "--out", dir}
	if code := run(t.Context(), e, args); code != exitOK {
		t.Fatalf("exit code %d: %s", code, errs.String())
	}
	if _, err := pki.ReadAuthority(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")); err != nil {
		t.Error(err)
	}
	if code := run(t.Context(), e, args); code != exitFailed || !strings.Contains(errs.String(), "ca.crt is there already") {
		t.Errorf("again: exit code %d: %s", code, errs.String())
	}
}
