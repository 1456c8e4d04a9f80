package main

import (
	"archive/tar"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// TestImage builds the image as a user does, unpacks it as a container runtime does, and runs what is in it with nothing else.
func TestImage(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "program")
	if err := build("./testdata/program", runtime.GOARCH, file); err != nil {
		t.Fatal(err)
	}
	image, err := pack(file, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	images := map[string]v1.Image{runtime.GOARCH: image}
	first, err := write(filepath.Join(dir, "a"), "", []string{runtime.GOARCH}, images)
	if err != nil {
		t.Fatal(err)
	}
	// From the same program, later.
	if image, err = pack(file, runtime.GOARCH); err != nil {
		t.Fatal(err)
	}
	images[runtime.GOARCH] = image
	second, err := write(filepath.Join(dir, "b"), "", []string{runtime.GOARCH}, images)
	if err != nil || first != second {
		t.Errorf("the same program gives %s and %s, %v", first, second, err)
	}
	if _, err := write(filepath.Join(dir, "a"), "", []string{runtime.GOARCH}, images); err == nil {
		t.Error("wrote over an image that was there")
	}
	if _, err := write(filepath.Join(dir, "x.tar"), "causeway/clustermesh:dev", []string{"amd64", "arm64"}, images); err == nil {
		t.Error("two architectures in one archive")
	}
	archive := filepath.Join(dir, "image.tar")
	if _, err := write(archive, "causeway/clustermesh:dev", []string{runtime.GOARCH}, images); err != nil {
		t.Error(err)
	} else if _, err := tarball.ImageFromPath(archive, nil); err != nil {
		t.Error(err)
	}

	index, err := layout.ImageIndexFromPath(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 || manifest.Manifests[0].Platform.Architecture != runtime.GOARCH {
		t.Fatalf("index %+v, %v", manifest, err)
	}
	stored, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := stored.ConfigFile()
	if err != nil || len(config.Config.Entrypoint) != 1 || config.Config.Labels["org.opencontainers.image.title"] != "causeway" || !config.Created.Equal(epoch) {
		t.Fatalf("config %+v, %v", config, err)
	}
	root := filepath.Join(dir, "root")
	layers, err := stored.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range layers {
		content, err := layer.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		unpack(t, content, root)
		content.Close()
	}
	out, err := exec.Command(filepath.Join(root, config.Config.Entrypoint[0]), "version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "clustermesh ") {
		t.Errorf("version: %s, %v", out, err)
	}
	if target, err := filepath.EvalSymlinks(filepath.Join(root, plugin)); err != nil || filepath.Base(target) != program {
		t.Errorf("the plugin is %s, %v", target, err)
	}
}

func unpack(t *testing.T, content io.Reader, root string) {
	t.Helper()
	for r := tar.NewReader(content); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 {
			t.Errorf("%s has the time %s and the owner %d", h.Name, h.ModTime, h.Uid)
		}
		name := filepath.Join(root, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, name)
		default:
			var f *os.File
			if f, err = os.OpenFile(name, os.O_CREATE|os.O_WRONLY, os.FileMode(h.Mode)); err == nil {
				_, err = io.Copy(f, r)
				err = firstOf(err, f.Close())
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
