// Command image builds the OCI image of clustermesh without a container engine: the static program alone, on nothing. The same source gives the same image, bit for bit.
package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	program = "clustermesh"
	// plugin is the name that container runtimes call the program by: see k8s/cni.
	plugin = "causeway-cni"
)

// epoch is the time of everything in the image.
var epoch = time.Unix(0, 0).UTC()

func main() {
	output := flag.String("output", "", "a new `DIRECTORY`, for an OCI layout of all architectures, or a FILE.tar for one, which \"ctr images import\" and \"docker load\" take (required)")
	tag := flag.String("tag", "causeway/clustermesh:dev", "the image's `NAME` in FILE.tar")
	arch := flag.String("arch", runtime.GOARCH, "`ARCHITECTURES`, as in amd64,arm64")
	source := flag.String("source", "./cmd/clustermesh", "the program's `PACKAGE`")
	flag.Parse()
	if *output == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*output, *tag, *source, strings.Split(*arch, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(output, tag, source string, architectures []string) error {
	work, err := os.MkdirTemp("", "causeway-image")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	images := map[string]v1.Image{}
	for _, arch := range architectures {
		file := filepath.Join(work, arch)
		if err := build(source, arch, file); err != nil {
			return err
		}
		if images[arch], err = pack(file, arch); err != nil {
			return err
		}
	}
	digest, err := write(output, tag, architectures, images)
	if err != nil {
		return err
	}
	fmt.Println(digest)
	return nil
}

// build compiles the program for an architecture, so that it needs nothing of the machine that it runs on.
func build(source, arch, file string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building %s for %s: %w", source, arch, err)
	}
	return checkStatic(file)
}

// checkStatic refuses a program that wants a loader or libraries, which the image has not.
func checkStatic(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically, and the image has nothing to load it with", file)
		}
	}
	return nil
}

// pack makes an image of a program.
func pack(file, arch string) (v1.Image, error) {
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		content, err := archive(file)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(bytes.NewReader(content)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	image, err = mutate.Append(image, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: program}})
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Created, config.OS, config.Architecture = v1.Time{Time: epoch}, "linux", arch
	config.Config = v1.Config{
		Entrypoint: []string{"/" + program}, Env: []string{"PATH=/"}, WorkingDir: "/",
		Labels: map[string]string{
			"org.opencontainers.image.title":       "causeway",
			"org.opencontainers.image.description": "Causeway joins clusters into one network: agent, store, CNI plugin and command line",
		},
	}
	return mutate.ConfigFile(image, config)
}

// archive is the file system: the program, the link by which it is the CNI plugin, and a directory for temporary files.
func archive(file string) ([]byte, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range []tar.Header{
		{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777},
		{Name: program, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(content))},
		{Name: plugin, Typeflag: tar.TypeSymlink, Linkname: program, Mode: 0o777},
	} {
		h.ModTime, h.Format = epoch, tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// write returns the digest of what it has written.
func write(output, tag string, architectures []string, images map[string]v1.Image) (v1.Hash, error) {
	if filepath.Ext(output) == ".tar" {
		if len(architectures) != 1 {
			return v1.Hash{}, fmt.Errorf("%s holds one architecture: name a directory for %d", output, len(architectures))
		}
		ref, err := name.NewTag(tag)
		if err != nil {
			return v1.Hash{}, err
		}
		image := images[architectures[0]]
		if err := tarball.WriteToFile(output, ref, image); err != nil {
			return v1.Hash{}, err
		}
		return image.Digest()
	}
	if entries, err := os.ReadDir(output); err == nil && len(entries) > 0 {
		return v1.Hash{}, fmt.Errorf("%s is there and not empty: name a new directory", output)
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range architectures {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: images[arch], Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	if _, err := layout.Write(output, index); err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}
