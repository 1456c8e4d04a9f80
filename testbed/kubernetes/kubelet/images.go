package kubelet

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"
)

// Image is what a container runs whose image's name matches.
type Image struct {
	// Image is a glob as of path.Match, but * also matches slashes; :latest may be left out.
	Image string `json:"image"`
	// Command and Args are what an image calls ENTRYPOINT and CMD: a container's command replaces both, its args only the second.
	Command []string          `json:"command,omitempty"`
	Args    []string          `json:"args,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
}

// Images is a table of images, the first that matches counts. It is read at each use, so that it may be changed while kubelets run.
type Images string

// find returns the image of that name; errNotFound if the table has none.
func (t Images) find(name string) (Image, error) {
	b, err := os.ReadFile(string(t))
	if err != nil {
		return Image{}, fmt.Errorf("reading the table of images: %w", err)
	}
	return findImage(b, string(t), name)
}

func findImage(table []byte, file, name string) (Image, error) {
	var images []Image
	if err := yaml.UnmarshalStrict(table, &images); err != nil {
		return Image{}, fmt.Errorf("reading the table of images %s: %w", file, err)
	}
	// path.Match treats slashes apart.
	plain := func(s string) string { return strings.ReplaceAll(strings.TrimSuffix(s, ":latest"), "/", "\x00") }
	for _, image := range images {
		ok, err := path.Match(plain(image.Image), plain(name))
		if err != nil {
			return Image{}, fmt.Errorf("table of images %s: %q: %w", file, image.Image, err)
		}
		if ok {
			return image, nil
		}
	}
	return Image{}, fmt.Errorf("image %q %w in the table of images %s: add an entry that matches it", name, errNotFound, file)
}

// argv returns the command of a container that says command and args of its own.
func (i Image) argv(command, args []string) []string {
	switch {
	case len(command) > 0:
	case len(args) > 0:
		command = i.Command
	default:
		command, args = i.Command, i.Args
	}
	return append(append([]string{}, command...), args...)
}

type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	table Images
	root  string
}

func (s imageService) ListImages(context.Context, *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	return &runtimeapi.ListImagesResponse{}, nil
}

func (s imageService) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	name := r.GetImage().GetImage()
	if _, err := s.table.find(name); err != nil {
		return &runtimeapi.ImageStatusResponse{}, nil // so that the kubelet pulls it, which says what is wrong
	}
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: name, RepoTags: []string{name}, Size: 1, Spec: r.Image}}, nil
}

func (s imageService) PullImage(_ context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if _, err := s.table.find(r.GetImage().GetImage()); err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: r.GetImage().GetImage()}, nil
}

func (s imageService) RemoveImage(context.Context, *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	return &runtimeapi.RemoveImageResponse{}, nil
}

func (s imageService) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	usage := []*runtimeapi.FilesystemUsage{{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.root}, UsedBytes: &runtimeapi.UInt64Value{}, InodesUsed: &runtimeapi.UInt64Value{}}}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: usage, ContainerFilesystems: usage}, nil
}
