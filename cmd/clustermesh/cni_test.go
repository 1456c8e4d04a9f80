package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"causeway/k8s/cni"
)

// TestCNIPlugin calls the program as a container runtime does: by a link of the plugin's name, and as a command.
func TestCNIPlugin(t *testing.T) {
	agent := newFakeAgent(t, map[string]string{"GET /v1/cni": `{"ready":false,"reason":"it is the test's"}`})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	call := func(name, command string, args ...string) (string, error) {
		program := filepath.Join(dir, name)
		if _, err := os.Lstat(program); err != nil {
			if err := os.Symlink(self, program); err != nil {
				t.Fatal(err)
			}
		}
		c := exec.Command(program, args...)
		c.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "CNI_COMMAND="+command, "CNI_PATH="+dir)
		c.Stdin = strings.NewReader(`{"cniVersion":"1.1.0","name":"pods","type":"causeway-cni","socket":"` + agent.socket + `"}`)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	for name, args := range map[string][]string{cni.Name: nil, "clustermesh": {"cni"}} {
		if out, err := call(name, "VERSION", args...); err != nil || !strings.Contains(out, `"1.1.0"`) {
			t.Errorf("%s VERSION: %v\n%s", name, err, out)
		}
		out, err := call(name, "STATUS", args...)
		if err == nil || !strings.Contains(out, `"code": 50`) || !strings.Contains(out, "it is the test's") || strings.Contains(out, "error:") {
			t.Errorf("%s STATUS: %v\n%s", name, err, out)
		}
		if out, err := call(name, "", args...); err != nil || !strings.Contains(out, "connects pods to Causeway") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}
