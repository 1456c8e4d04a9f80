package cri

import (
	"errors"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestFindImage(t *testing.T) {
	const table = `
- {image: "*/agnhost:*", command: [kubernetes, agnhost], args: [pause]}
- {image: busybox, args: [sh]}
- {image: "example.org/web:1.?", command: [serve], env: {PORT: "80"}}
- {image: "*", command: [anything]}
`
	for name, want := range map[string]string{
		"e2e-test-images/agnhost:2.53": "kubernetes",
		"busybox":                      "",
		"busybox:latest":               "",
		"busybox:1":                    "anything",
		"example.org/web:1.2":          "serve",
		"example.org/web:2.1":          "anything",
	} {
		image, err := findImage([]byte(table), "images.yaml", name)
		if got := strings.Join(image.Command, " "); err != nil || !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%s runs %q (%v), not %q", name, got, err, want)
		}
	}
	for _, c := range []struct{ table, says string }{
		{"[{image: web}]", `"shop:latest" not found in the table of images images.yaml`},
		{"[{image: '['}]", "syntax error in pattern"},
		{"[{image: web, comand: [x]}]", `unknown field "comand"`},
	} {
		_, err := findImage([]byte(c.table), "images.yaml", "shop:latest")
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("with %s: %v, which does not say %s", c.table, err, c.says)
		}
	}
	if _, err := findImage([]byte("[]"), "", "x"); !errors.Is(err, errNotFound) {
		t.Errorf("an empty table: %v", err)
	}
}

func TestArgv(t *testing.T) {
	image := Image{Command: []string{"entry"}, Args: []string{"cmd"}}
	for _, c := range []struct{ command, args, want string }{
		{"", "", "entry cmd"},
		{"", "a b", "entry a b"},
		{"c", "", "c"},
		{"c", "a b", "c a b"},
	} {
		if got := image.argv(strings.Fields(c.command), strings.Fields(c.args)); strings.Join(got, " ") != c.want {
			t.Errorf("command %q and args %q run %q, not %q", c.command, c.args, got, c.want)
		}
	}
	if image.Command[0] != "entry" || len(image.Command) != 1 {
		t.Errorf("the image became %+v", image)
	}
}

func TestEnvironment(t *testing.T) {
	got := environment(Image{Env: map[string]string{"A": "image", "B": "image"}}, &sandbox{config: &runtimeapi.PodSandboxConfig{Hostname: "web-0"}},
		&runtimeapi.ContainerConfig{Tty: true, Envs: []*runtimeapi.KeyValue{{Key: "B", Value: []byte("own")}, {Key: "PATH", Value: []byte("/x")}}})
	want := []string{"PATH=/x", "HOSTNAME=web-0", "HOME=/root", "TERM=xterm", "A=image", "B=own"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestResolvConf(t *testing.T) {
	got := resolvConf(&runtimeapi.DNSConfig{Servers: []string{"10.96.0.10", "fd00::a"}, Searches: []string{"a.svc.cluster.local", "svc.cluster.local"}, Options: []string{"ndots:5"}})
	want := "nameserver 10.96.0.10\nnameserver fd00::a\nsearch a.svc.cluster.local svc.cluster.local\noptions ndots:5\n"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := resolvConf(&runtimeapi.DNSConfig{}); got != "" {
		t.Errorf("of nothing came %q", got)
	}
}

func TestParseLog(t *testing.T) {
	for line, want := range map[string]string{
		"2026-01-02T03:04:05.6Z stdout F a  line\n":  "stdout:a  line\n",
		"2026-01-02T03:04:05.6Z stderr P prompt> \n": "stderr:prompt> ",
		"2026-01-02T03:04:05.6Z stdout F \n":         "stdout:\n",
	} {
		stream, text, err := parseLog([]byte(line))
		if got := stream + ":" + string(text); err != nil || got != want {
			t.Errorf("%q is %q (%v), not %q", line, got, err, want)
		}
	}
	if _, _, err := parseLog([]byte("nonsense\n")); err == nil {
		t.Error("took nonsense for a line")
	}
}
