package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// archive writes files in the format that the kernel unpacks at boot: "newc" of cpio(5).
type archive struct {
	w    *bufio.Writer
	node int
	err  error
}

func newArchive(w io.Writer) *archive { return &archive{w: bufio.NewWriter(w)} }

func (a *archive) addDir(name string) { a.add(name, 0o040755, nil) }

func (a *archive) addFile(path, name string) {
	content, err := os.ReadFile(path)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.add(name, 0o100755, content)
}

func (a *archive) add(name string, mode uint32, content []byte) {
	a.node++
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.node, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	for _, part := range []string{header, string(content)} {
		padding := strings.Repeat("\x00", (4-len(part)%4)%4)
		if _, err := io.WriteString(a.w, part+padding); err != nil && a.err == nil {
			a.err = err
		}
	}
}

// close ends the archive. It returns the first error of all that was added.
func (a *archive) close() error {
	a.add("TRAILER!!!", 0, nil)
	if a.err != nil {
		return a.err
	}
	return a.w.Flush()
}
