package l7

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
)

// BuildID tells this process's program from others: the first half of its SHA-256. It is that of the file which runs, also when another has taken its place.
func BuildID() (string, error) { return BuildIDOf("/proc/self/exe") }

// BuildIDOf is the BuildID that a process of the program at path would have.
func BuildIDOf(path string) (string, error) {
	program, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("reading the program: %w", err)
	}
	defer program.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, program); err != nil {
		return "", fmt.Errorf("reading the program %s: %w", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil)[:16]), nil
}
