package l7

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"io"
	"os"
)

// BuildID tells this process's program from others. It is that of the file which runs, also when another has taken its place.
func BuildID() (string, error) { return BuildIDOf("/proc/self/exe") }

// BuildIDOf is the BuildID that a process of the program at path would have: the first half of the SHA-256 of what the linker says of the
// program's content (the ELF section .note.go.buildid), or of the whole file if it says nothing. Reading the whole file, a hundred
// megabytes, would be a fifth of what an agent's start takes.
func BuildIDOf(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("reading the program: %w", err)
	}
	defer file.Close()
	var content io.Reader = file
	if program, err := elf.NewFile(file); err == nil {
		if note := program.Section(".note.go.buildid"); note != nil && note.Size > minBuildNote {
			content = note.Open()
		}
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, content); err != nil {
		return "", fmt.Errorf("reading the program %s: %w", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil)[:16]), nil
}

// minBuildNote is the size in bytes of a note that says nothing: three numbers and the name "Go".
const minBuildNote = 3*4 + 4
