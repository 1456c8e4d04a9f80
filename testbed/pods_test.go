package testbed

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

func TestPods(t *testing.T) {
	b := mustUp(t, Options{})
	ctx := t.Context()
	server := PodSpec{
		Cluster: "east", Node: "node1", Name: "web", Labels: map[string]string{"app": "web"}, ReadyPort: 8080,
		Command: []string{"clustermesh", "serve", "east/web", ":8080"},
	}
	pod, err := b.RunPod(ctx, server)
	if err != nil {
		t.Fatal(err)
	}
	if pod.State != "running" || pod.PID == 0 || pod.Address != addr("10.1.1.2") || pod.Namespace != "default" {
		t.Errorf("pod %+v", pod)
	}
	if out, code := run(t, b, "east/pod:web", "curl", "-s", "-D-", "http://127.0.0.1:8080/x"); code != 0 || !strings.Contains(out, ServedByHeader+": east/web") {
		t.Errorf("the pod answers %q", out)
	}
	if out, _ := run(t, b, "east/pod:web", "cat", "/proc/self/cgroup"); !strings.Contains(out, b.ID()+"/east/node1/pods/web") {
		t.Errorf("cgroup of the pod: %s", out)
	}
	if log, _ := os.ReadFile(b.AgentLog("east", "node1")); !strings.Contains(string(log), "PATCH /v1/endpoints/default/web") {
		t.Errorf("the pod was not made ready: %s", log)
	}
	if _, err := b.RunPod(ctx, server); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second pod of the name: %v", err)
	}

	t.Run("exit code", func(t *testing.T) {
		done := PodSpec{Cluster: "west", Node: "node1", Name: "done", Command: []string{"true"}}
		pod, err := b.RunPod(ctx, done)
		if err != nil || pod.State != "exited" || pod.ExitCode == nil || *pod.ExitCode != 0 {
			t.Errorf("pod %+v, %v", pod, err)
		}
	})
	for name, c := range map[string]struct {
		spec PodSpec
		want string
	}{
		"fails at once": {PodSpec{Command: []string{"sh", "-c", "echo no luck; exit 7"}}, "status 7"},
		"never listens": {PodSpec{Command: []string{"sh", "-c", "echo oops"}, ReadyPort: 80}, "oops"},
		"refused":       {PodSpec{Command: []string{"sleep", "9"}, Labels: map[string]string{"refuse": "1"}}, "refused as asked"},
		"no program":    {PodSpec{Command: []string{"no-such-program"}}, "no such command"},
		"no node":       {PodSpec{Command: []string{"true"}, Node: "node7"}, "node1 to node2"},
		"no cluster":    {PodSpec{Command: []string{"true"}, Cluster: "south"}, "east, west"},
		"bad name":      {PodSpec{Command: []string{"true"}, Name: "A_B"}, "lower case"},
		"no command":    {PodSpec{}, "no command"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := c.spec
			set := func(s *string, value string) {
				if *s == "" {
					*s = value
				}
			}
			set(&spec.Cluster, "east")
			set(&spec.Node, "node1")
			set(&spec.Name, "p")
			if _, err := b.RunPod(ctx, spec); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if fileExists(netnsPath(b.podNS(spec.Cluster, spec.Name))) {
				t.Error("its namespace stays")
			}
		})
	}

	t.Run("delete", func(t *testing.T) {
		if warning, err := b.DeletePod(ctx, "east", "web", DefaultGrace); err != nil || warning != "" {
			t.Errorf("%q, %v", warning, err)
		}
		if fileExists(netnsPath(b.podNS("east", "web"))) {
			t.Error("its namespace stays")
		}
		pods, err := b.Pods()
		if err != nil || len(pods) != 1 {
			t.Errorf("pods %+v, %v", pods, err)
		}
	})
	t.Run("delete without agent", func(t *testing.T) {
		stubborn := PodSpec{Cluster: "east", Node: "node2", Name: "stubborn", Command: []string{"sh", "-c", "trap '' TERM; sleep 60 & wait; wait"}}
		pod, err := b.RunPod(ctx, stubborn)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Kill(ctx, Victim{Kind: "agent", Cluster: "east", Node: "node2"}); err != nil {
			t.Fatal(err)
		}
		warning, err := b.DeletePod(ctx, "east", "stubborn", 100*time.Millisecond)
		if err != nil || !strings.Contains(warning, "east/node2") {
			t.Errorf("%q, %v", warning, err)
		}
		if p, err := processOf(pod.PID); err == nil && p.alive() {
			t.Error("its process lives")
		}
	})
}

func TestKillAndStart(t *testing.T) {
	b := mustUp(t, Options{})
	ctx := t.Context()
	agent := Victim{Kind: "agent", Cluster: "east", Node: "node1"}
	store := Victim{Kind: "kvstore", Cluster: "west"}
	node := Victim{Kind: "node", Cluster: "west", Node: "node2"}

	if err := b.Start(ctx, agent); err == nil {
		t.Error("an agent that runs was started")
	}
	pod, err := b.RunPod(ctx, PodSpec{Cluster: "west", Node: "node2", Name: "web", ReadyPort: 8080, Command: []string{"clustermesh", "serve", "web", ":8080"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []Victim{agent, store, node} {
		if err := b.Kill(ctx, v); err != nil {
			t.Fatalf("killing %v: %v", v, err)
		}
		if err := b.Kill(ctx, v); err == nil {
			t.Errorf("%v was killed twice", v)
		}
		if st, err := b.Status(ctx); err != nil || st.OK {
			t.Errorf("without %v: ok %v, %v", v, st.OK, err)
		}
	}
	if reaches(t, b, "east/node1", "172.29.2.12", false) {
		t.Error("a node that was killed still answers")
	}
	if _, err := b.RunPod(ctx, PodSpec{Cluster: "west", Node: "node2", Name: "new", Command: []string{"sleep", "9"}}); err == nil || !strings.Contains(err.Error(), "start node west/node2") {
		t.Errorf("a pod on a dead node: %v", err)
	}
	for _, v := range []Victim{store, node, agent} {
		if err := b.Start(ctx, v); err != nil {
			t.Fatalf("starting %v: %v", v, err)
		}
	}
	st, err := b.Status(ctx)
	if err != nil || !st.OK {
		t.Errorf("after starting everything: %+v, %v", st, err)
	}
	if len(st.Pods) != 1 || st.Pods[0].State != "running" || st.Pods[0].PID == pod.PID {
		t.Errorf("the node's pod after its return: %+v", st.Pods)
	}
	if !reaches(t, b, "east/node1", "172.29.2.12", true) {
		t.Error("the node does not answer after its return")
	}
}

// A cluster goes as a whole, whatever of it was down before, and comes back as a whole with its pods.
func TestKillAndStartCluster(t *testing.T) {
	b := mustUp(t, Options{})
	ctx := t.Context()
	west := Victim{Kind: "cluster", Cluster: "west"}
	if err := b.Start(ctx, west); err == nil || !strings.Contains(err.Error(), "all of it runs") {
		t.Errorf("a cluster that runs was started: %v", err)
	}
	if _, err := b.RunPod(ctx, PodSpec{Cluster: "west", Node: "node2", Name: "web", ReadyPort: 8080, Command: []string{"clustermesh", "serve", "web", ":8080"}}); err != nil {
		t.Fatal(err)
	}
	for _, v := range []Victim{{Kind: "agent", Cluster: "west", Node: "node2"}, {Kind: "node", Cluster: "west", Node: "node1"}, west} {
		if err := b.Kill(ctx, v); err != nil {
			t.Fatalf("killing %v: %v", v, err)
		}
	}
	if err := b.Kill(ctx, west); err == nil || !strings.Contains(err.Error(), "is down already") {
		t.Errorf("killed twice: %v", err)
	}
	for _, p := range mustState(t, b).processes() {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if p.alive() && strings.Contains(string(name), "/west/") {
			t.Errorf("process %d of west lives: %q", p.PID, name)
		}
	}
	for _, to := range []string{"172.29.2.2", "172.29.2.11", "172.29.2.12"} {
		if reaches(t, b, "east/node1", to, false) {
			t.Errorf("%s still answers", to)
		}
	}
	if !reaches(t, b, "east/node1", "172.29.1.12", true) {
		t.Error("the other cluster is gone too")
	}
	if err := b.Start(ctx, west); err != nil {
		t.Fatal(err)
	}
	st, err := b.Status(ctx)
	if err != nil || !st.OK || len(st.Pods) != 1 || st.Pods[0].State != "running" {
		t.Errorf("after its return: %+v, %v", st, err)
	}
	for _, to := range []string{"172.29.2.2", "172.29.2.11", "172.29.2.12"} {
		if !reaches(t, b, "east/node1", to, true) {
			t.Errorf("%s does not answer after its return", to)
		}
	}

	t.Run("its store alone", func(t *testing.T) {
		if err := b.Kill(ctx, west); err != nil {
			t.Fatal(err)
		}
		if err := b.Start(ctx, Victim{Kind: "kvstore", Cluster: "west"}); err != nil {
			t.Fatal(err)
		}
		if !reaches(t, b, "east/node1", "172.29.2.2", true) || reaches(t, b, "east/node1", "172.29.2.11", false) {
			t.Error("not the store, and the store alone, is back")
		}
	})
}

func TestSocketHere(t *testing.T) {
	b := mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1})
	if socket, err := SocketOf(b.Dir(), "east/node1"); err != nil || socket != b.socket("east", "node1") {
		t.Errorf("socket %q, %v", socket, err)
	}
	if _, err := SocketOf(b.Dir(), "east/node2"); err == nil {
		t.Error("a node that is not there has a socket")
	}
	if socket, ok := SocketHere(); ok {
		t.Errorf("outside of any node: %q", socket)
	}
	for target, want := range map[string]string{"east/node1": b.socket("east", "node1"), "east/kvstore": ""} {
		at, _ := ParseTarget(target)
		var out strings.Builder
		// Only namespaces tell: the environment that Exec gives does not matter here.
		if _, err := b.Exec(context.Background(), at, []string{os.Args[0], "here"}, Stdio{Out: &out}); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Errorf("%s: socket %q, want %q", target, out.String(), want)
		}
	}
}
