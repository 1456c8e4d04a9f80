package cni

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"causeway/agent/api"
)

func TestConfigHasDefaults(t *testing.T) {
	conf, err := decodeConfig([]byte(`{"cniVersion":"1.1.0","name":"pods","type":"causeway-cni"}`))
	if err != nil || conf.Socket != api.DefaultSocket || conf.LogFile != "" || conf.level.String() != "INFO" {
		t.Errorf("it is %+v, %v", conf, err)
	}
}

func TestConfigIsRefusedWithAReason(t *testing.T) {
	for _, test := range []struct {
		conf string
		code uint
		want string // empty: it is accepted
	}{
		{`"socket":"/run/x.sock","logFile":"/var/log/x","logLevel":"debug","cni.dev/anything":[],"args":{},"runtimeConfig":{},"prevResult":{},"dns":{}`, 0, ""},
		{`"Socket":"/run/x.sock"`, types.ErrInvalidNetworkConfig, `unknown key "Socket"`}, // which encoding/json would take for socket
		{`"mtu":1400`, types.ErrInvalidNetworkConfig, `unknown key "mtu"`},
		{`"socket":"x.sock"`, types.ErrInvalidNetworkConfig, `socket "x.sock": want an absolute path`},
		{`"logLevel":"loud"`, types.ErrInvalidNetworkConfig, `logLevel "loud": want debug, info, warn or error`},
		{`"ipMasq":true`, types.ErrInvalidNetworkConfig, "does not masquerade"},
		{`"capabilities":{"bandwidth":true}`, types.ErrInvalidNetworkConfig, `capability "bandwidth"`},
		{`"socket":7`, types.ErrDecodingFailure, "network configuration"},
		{`"socket":`, types.ErrDecodingFailure, "network configuration"},
	} {
		text := "{" + test.conf + "}"
		_, err := decodeConfig([]byte(text))
		var refusal *types.Error
		if test.want == "" && err == nil {
			continue
		}
		if !errors.As(err, &refusal) || refusal.Code != test.code || !strings.Contains(refusal.Msg, test.want) || test.want == "" {
			t.Errorf("%s: %#v, want code %d and %q", text, err, test.code, test.want)
		}
	}
}

// TestCodes: what time may change is worth another try to whoever called, and what it does not change is not tried again.
func TestCodes(t *testing.T) {
	for _, test := range []struct {
		err    error
		code   uint
		passes bool
	}{
		{&api.Error{Status: 400, Message: "x"}, types.ErrInvalidEnvironmentVariables, false},
		{&api.Error{Status: 404, Message: "x"}, types.ErrTryAgainLater, true},
		{&api.Error{Status: 409, Message: "x"}, types.ErrInternal, false},
		{&api.Error{Status: 500, Message: "x"}, types.ErrInternal, false},
		{&api.Error{Status: 501, Message: "x"}, types.ErrInvalidNetworkConfig, false},
		{&api.Error{Status: 503, Message: "x"}, types.ErrTryAgainLater, true},
		{api.ErrNoAgent, types.ErrTryAgainLater, true},
		{&fs.PathError{Err: fs.ErrPermission}, types.ErrIOFailure, false},
		{types.NewError(types.ErrUnknownContainer, "x", ""), types.ErrUnknownContainer, false},
	} {
		if got := refusal(test.err); got.Code != test.code || got.Msg == "" || passing(test.err) != test.passes {
			t.Errorf("%v: code %d, passing %v; want %d, %v", test.err, got.Code, passing(test.err), test.code, test.passes)
		}
	}
}

// TestAnAgentThatDoesNotAnswer: the plugin gives up in time, and says what it is about.
func TestAnAgentThatDoesNotAnswer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() // nobody accepts
	conf, err := json.Marshal(map[string]string{"cniVersion": "1.1.0", "name": "pods", "type": Name, "socket": socket})
	if err != nil {
		t.Fatal(err)
	}
	p := &Plugin{Patience: 50 * time.Millisecond, Remove: func(string, string) error {
		t.Error("the plugin removed a link of a pod whose agent may be alive")
		return nil
	}}
	for verb, do := range map[string]func(context.Context, *call) error{"ADD": p.add, "DEL": p.del, "STATUS": p.status} {
		args := &skel.CmdArgs{ContainerID: "one", Netns: "/run/netns/one", IfName: "eth0", Args: "K8S_POD_NAMESPACE=default;K8S_POD_NAME=shop-1", StdinData: conf}
		var refusal *types.Error
		if err := p.answer(verb, args, do); !errors.As(err, &refusal) || !strings.Contains(refusal.Error(), "has not answered in time") {
			t.Errorf("%s: %#v", verb, err)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"pods","type":"causeway-cni","socket":"/run/x","logFile":"/var/log/x","logLevel":"debug"}`))
	f.Add([]byte(`{"prevResult":{"ips":[]},"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],"capabilities":{"a":true}}`))
	f.Add([]byte(`{"ipam":{"type":"x"},"dns":{"nameservers":["a"]},"ipMasq":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		conf, err := decodeConfig(data)
		var refusal *types.Error
		switch {
		case err != nil && (!errors.As(err, &refusal) || refusal.Msg == ""):
			t.Errorf("%q is refused without a reason: %v", data, err)
		case err == nil && (!filepath.IsAbs(conf.Socket) || conf.LogFile != "" && !filepath.IsAbs(conf.LogFile) || !conf.IPAM.IsEmpty() || conf.IPMasq):
			t.Errorf("%q is accepted as %+v", data, conf)
		case err == nil:
			c := &call{conf: conf}
			_, _ = c.previous()
		}
	})
}

func FuzzArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=shop-1;K8S_POD_INFRA_CONTAINER_ID=a;K8S_POD_UID=b")
	f.Add("CommonArgs=1;K8S_POD_NAME")
	f.Fuzz(func(t *testing.T, args string) {
		pod, err := podOf(args)
		var refusal *types.Error
		if err == nil && (pod.K8S_POD_NAME == "" || pod.K8S_POD_NAMESPACE == "") || err != nil && !errors.As(err, &refusal) {
			t.Errorf("%q is %+v, %v", args, pod, err)
		}
	})
}
