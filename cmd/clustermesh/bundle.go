package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// bundleNameTimeout bounds the wait for the agent's name, which only makes a nicer file name.
const bundleNameTimeout = 2 * time.Second

func newBundleCommand(e *env) *cobra.Command {
	var file string
	var force bool
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Write all that a bug report needs into a file, without secrets",
		Long: `Write what a bug report needs into a gzipped tar: the node's state, tables, maps, logs and metrics. There is no secret in it: no key,
no token, no certificate's key. Names and addresses are, so look at who gets it.

The file is causeway-CLUSTER-NODE-TIME.tar.gz in the current directory unless --output says otherwise. Only its owner can read it, and one
that exists is not overwritten.

Exit codes:
  0    it is written
  1    it could not be made or written; no part of it is left
  2    wrong usage, or no agent there
  130  interrupted; no part of it is left`,
		Example: `  clustermesh bundle
  clustermesh bundle --output /tmp/west.tar.gz --node west/node1
  clustermesh bundle --output - | tar -tz`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "-" && e.terminal {
				return usageError("--output - would write a compressed tar on the terminal: pipe it somewhere, or name a file")
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			if file == "-" {
				return c.Bundle(cmd.Context(), e.out)
			}
			if file == "" {
				if file, err = e.bundleName(cmd.Context(), c); err != nil {
					return err
				}
			}
			return e.bundle(cmd.Context(), c, file, force)
		},
	}
	cmd.Flags().StringVar(&file, "output", "", "the `FILE` to write; - is stdout")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite a file that exists")
	return cmd
}

// unfit matches what does not belong into a file's name.
var unfit = regexp.MustCompile(`[^A-Za-z0-9-]+`)

// bundleName returns the name of the file if none is given. A node that is too ill to say who it is gets a bundle too.
func (e *env) bundleName(ctx context.Context, c *api.Client) (string, error) {
	bounded, cancel := context.WithTimeout(ctx, bundleNameTimeout)
	defer cancel()
	who := "node"
	s, err := c.Status(bounded)
	switch {
	case errors.Is(err, api.ErrNoAgent):
		return "", err
	case ctx.Err() != nil:
		return "", &exitError{exitInterrupted, errors.New("interrupted")}
	case err == nil:
		who = unfit.ReplaceAllString(s.Cluster+"-"+s.Node, "_")
	}
	return fmt.Sprintf("causeway-%s-%s.tar.gz", who, e.now().UTC().Format("20060102T150405Z")), nil
}

// bundle writes the file, or leaves none and nothing of it.
func (e *env) bundle(ctx context.Context, c *api.Client, file string, force bool) error {
	if err := mayWrite(file, force); err != nil {
		return err
	}
	// Beside the file under another name, so that what stood there stays until the new one is complete. The mode is 0600.
	part, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return fmt.Errorf("making the file for the bundle: %w", err)
	}
	defer os.Remove(part.Name())
	count := &byteCount{w: part}
	if e.terminalErr {
		count.show = e.err
	}
	err = errors.Join(c.Bundle(ctx, count), part.Close())
	count.end()
	switch {
	case err != nil && ctx.Err() != nil:
		return &exitError{exitInterrupted, errors.New("interrupted; no part of the bundle is left")}
	case err != nil:
		return err
	}
	if err := mayWrite(file, force); err != nil { // somebody may have made it meanwhile
		return err
	}
	if err := os.Rename(part.Name(), file); err != nil {
		return fmt.Errorf("giving the bundle its name: %w", err)
	}
	fmt.Fprintf(e.out, "%s: %s\n", printable(file), size(count.n))
	return nil
}

// mayWrite refuses a file that exists without force, and in any case what is no file.
func mayWrite(file string, force bool) error {
	there, err := os.Lstat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("looking for the bundle's file: %w", err)
	case !there.Mode().IsRegular():
		return fmt.Errorf("%s is there already and no file: name another one", file)
	case !force:
		return fmt.Errorf("%s is there already: name another file with --output, or overwrite it with --force", file)
	}
	return nil
}

// byteCount counts what is written, and shows it in place while it grows.
type byteCount struct {
	w     io.Writer
	show  io.Writer // nil: nowhere
	n     int64
	shown time.Time
}

func (b *byteCount) Write(p []byte) (int, error) {
	n, err := b.w.Write(p)
	b.n += int64(n)
	if b.show != nil && time.Since(b.shown) > 100*time.Millisecond {
		b.shown = time.Now()
		fmt.Fprintf(b.show, "\r%s so far\x1b[K", size(b.n))
	}
	return n, err
}

// end takes the count off the terminal.
func (b *byteCount) end() {
	if !b.shown.IsZero() {
		fmt.Fprint(b.show, "\r\x1b[K")
	}
}

// size is a number of bytes for people.
func size(n int64) string {
	switch {
	case n < 10<<10:
		return fmt.Sprintf("%d bytes", n)
	case n < 10<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
