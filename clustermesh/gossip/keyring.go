package gossip

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/memberlist"
)

// maxKeys bounds the keys of a ring. Two are enough to change from one to the other.
const maxKeys = 8

// keySize of a gossip key, in bytes: AES-256.
const keySize = 32

// NewKey makes a gossip key.
func NewKey() []byte {
	key := make([]byte, keySize)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the program instead
	return key
}

// Fingerprint names a key without telling it: the first 8 hex digits of its SHA-256.
func Fingerprint(key []byte) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:4])
}

// ParseKey reads a key as base64. The error does not show it.
func ParseKey(text string) ([]byte, error) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil || len(key) != keySize {
		return nil, fmt.Errorf("a gossip key is base64 of %d bytes, as of: head -c %d /dev/urandom | base64", keySize, keySize)
	}
	return key, nil
}

// keyFile holds the ring, the key that encrypts first.
type keyFile string

func (f keyFile) read() (ring Ring, err error) {
	info, err := os.Stat(string(f))
	if err != nil {
		return ring, fmt.Errorf("gossip keys: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return ring, fmt.Errorf("gossip keys: others can read %s (mode %04o); chmod 600 it", f, info.Mode().Perm())
	}
	data, err := os.ReadFile(string(f))
	if err != nil {
		return ring, fmt.Errorf("gossip keys: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if at, is := strings.CutPrefix(line, changedLine); is {
			// Anything else in such a comment is people's.
			if at, err := strconv.ParseUint(at, 10, 64); err == nil && at <= maxRingAt {
				ring.At = at
			}
		}
		if line != "" && !strings.HasPrefix(line, "#") {
			key, err := ParseKey(line)
			if err != nil {
				return ring, fmt.Errorf("%s:%d: %w", f, n, err)
			}
			ring.Keys = append(ring.Keys, key)
		}
	}
	return ring, checkKeys(ring.Keys)
}

// changedLine starts the comment that says since when the ring is as it is: Ring.At. Earlier versions skip it.
const changedLine = "# changed "

// readOrMake makes a file with one new key if there is none.
func (f keyFile) readOrMake() (Ring, error) {
	ring, err := f.read()
	if !errors.Is(err, fs.ErrNotExist) {
		return ring, err
	}
	ring = Ring{Keys: [][]byte{NewKey()}}
	if err := f.write(ring); err != nil {
		return ring, fmt.Errorf("%w; gossip.keyFile must be in a directory that this agent can write to", err)
	}
	return ring, nil
}

// write replaces the file at once.
func (f keyFile) write(ring Ring) error {
	var text strings.Builder
	if ring.At > 0 {
		fmt.Fprintf(&text, "%s%d\n", changedLine, ring.At)
	}
	for _, key := range ring.Keys {
		text.WriteString(base64.StdEncoding.EncodeToString(key) + "\n")
	}
	temporary := string(f) + ".new"
	if err := os.WriteFile(temporary, []byte(text.String()), 0o600); err != nil {
		return fmt.Errorf("gossip keys: %w", err)
	}
	if err := os.Rename(temporary, string(f)); err != nil {
		return fmt.Errorf("gossip keys: %w", err)
	}
	return nil
}

func checkKeys(keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("gossip keys: there is none")
	}
	if len(keys) > maxKeys {
		return fmt.Errorf("gossip keys: %d, at most %d are possible; remove old ones", len(keys), maxKeys)
	}
	for i, key := range keys {
		if len(key) != keySize {
			return fmt.Errorf("gossip keys: one of %d bytes; they have %d", len(key), keySize)
		}
		if slices.ContainsFunc(keys[:i], func(other []byte) bool { return bytes.Equal(other, key) }) {
			return fmt.Errorf("gossip keys: %s is there twice", Fingerprint(key))
		}
	}
	return nil
}

// applyKeys makes a ring hold these keys, the first to encrypt with, and no others.
func applyKeys(ring *memberlist.Keyring, keys [][]byte) error {
	for _, key := range keys {
		if err := ring.AddKey(key); err != nil {
			return err
		}
	}
	if err := ring.UseKey(keys[0]); err != nil {
		return err
	}
	for _, old := range ring.GetKeys() {
		if !slices.ContainsFunc(keys, func(key []byte) bool { return bytes.Equal(key, old) }) {
			if err := ring.RemoveKey(old); err != nil {
				return err
			}
		}
	}
	return nil
}

// fingerprints names keys in order.
func fingerprints(keys [][]byte) []string {
	out := make([]string, len(keys))
	for i, key := range keys {
		out[i] = Fingerprint(key)
	}
	return out
}
