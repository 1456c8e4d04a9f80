package tunnel

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// keyFile is where a slot's private key is: base64 in a line, as "wg genkey" has it.
func keyFile(dir string, slot uint8) string {
	return filepath.Join(dir, fmt.Sprintf("wireguard-%d.key", slot))
}

// loadKey reads a private key, which nobody but the file's owner may be able to. No error contains any of it.
func loadKey(path string) (wgtypes.Key, error) {
	file, err := os.Open(path)
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("reading WireGuard's private key: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("reading WireGuard's private key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return wgtypes.Key{}, fmt.Errorf("WireGuard's private key %s may be read by others (mode %04o): if nobody has, chmod 600 it, otherwise remove it and get a new one", path, info.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(file, 256))
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("reading WireGuard's private key: %w", err)
	}
	key, err := parsePrivateKey(text)
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("WireGuard's private key %s: %w: restore it, or remove it to get a new one", path, err)
	}
	return key, nil
}

func parsePrivateKey(text []byte) (wgtypes.Key, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSpace(text)))
	if err != nil {
		return wgtypes.Key{}, errors.New("it is not base64")
	}
	if len(raw) != wgtypes.KeyLen {
		return wgtypes.Key{}, fmt.Errorf("it has %d bytes, want %d", len(raw), wgtypes.KeyLen)
	}
	if bytes.Equal(raw, make([]byte, wgtypes.KeyLen)) {
		return wgtypes.Key{}, errors.New("it is all zeros")
	}
	return wgtypes.Key(raw), nil
}

// makeKey makes a private key and returns when it is on the disk.
func makeKey(path string) (wgtypes.Key, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("making a WireGuard key: %w", err)
	}
	if err := writeState(path, []byte(key.String()+"\n")); err != nil {
		return wgtypes.Key{}, fmt.Errorf("writing WireGuard's private key: %w", err)
	}
	return key, nil
}

// writeState replaces a file of the state directory (0600) by one that is on the disk, or leaves the old one.
func writeState(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	name := path + ".new"
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(name, path)
}
