package pki

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// newSuffix is what a file is written under before it takes the place of the old one.
const newSuffix = ".new"

// WriteFiles replaces a certificate and its key at once, the key with mode 0600. Both are complete on disk before either takes its place,
// the key first; should the machine die in between, [Ensure] finds the certificate beside and puts it into place.
func WriteFiles(certFile, keyFile string, p Pair) error {
	if _, err := p.TLS(); err != nil {
		return err
	}
	if err := writeNew(keyFile, p.Key, 0o600); err != nil {
		return err
	}
	if err := writeNew(certFile, p.Cert, 0o644); err != nil {
		return err
	}
	for _, file := range []string{keyFile, certFile} {
		if err := os.Rename(file+newSuffix, file); err != nil {
			return fmt.Errorf("pki: %w", err)
		}
	}
	return syncDir(filepath.Dir(certFile))
}

// writeNew writes a file beside the one that it will replace.
func writeNew(file string, content []byte, mode fs.FileMode) error {
	name := file + newSuffix
	// One that was left behind may have another mode.
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pki: %w", err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("pki: write %s: %w", name, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	return nil
}

// files are a certificate's and its key's.
type files struct{ cert, key string }

func filesOf(dir, name string) files {
	return files{filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")}
}

// read returns the pair, after finishing a replacement that was cut short. What is missing is empty.
func (f files) read() (Pair, error) {
	cert, err := readIfThere(f.cert)
	if err != nil {
		return Pair{}, err
	}
	key, err := readIfThere(f.key)
	if err != nil {
		return Pair{}, err
	}
	p := Pair{Cert: cert, Key: key}
	if key == nil || fits(p) {
		return p, nil
	}
	next, err := readIfThere(f.cert + newSuffix)
	if err != nil {
		return Pair{}, err
	}
	if !fits(Pair{Cert: next, Key: key}) {
		return p, nil
	}
	if err := os.Rename(f.cert+newSuffix, f.cert); err != nil {
		return Pair{}, fmt.Errorf("pki: %w", err)
	}
	return Pair{Cert: next, Key: key}, nil
}

// fits tells whether the key is the certificate's.
func fits(p Pair) bool {
	_, err := p.TLS()
	return err == nil
}

func readIfThere(file string) ([]byte, error) {
	content, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return content, nil
}
