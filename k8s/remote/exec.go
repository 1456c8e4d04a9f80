package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"

	"causeway/k8s/install"
)

// pod is an Agent in a pod.
type pod struct {
	rest            *rest.Config
	client          kubernetes.Interface
	namespace, name string
	cluster         string
}

// FindAgent returns an agent of a cluster whose pod is ready. The cluster's name is for messages.
func FindAgent(ctx context.Context, cfg *rest.Config, namespace, cluster string) (Agent, error) {
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	pods, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(install.AgentLabels()).String()})
	if err != nil {
		return nil, fmt.Errorf("agents of %s at %s: %w", cluster, cfg.Host, err)
	}
	for _, p := range pods.Items {
		if ready(&p) {
			return &pod{rest: cfg, client: client, namespace: namespace, name: p.Name, cluster: cluster}, nil
		}
	}
	if len(pods.Items) == 0 {
		return nil, fmt.Errorf("there is no agent in the namespace %s of %s: install it first, with clustermesh install, or name another --namespace", namespace, cluster)
	}
	return nil, fmt.Errorf("none of the %d agents of %s is ready: see why with kubectl -n %s get pods", len(pods.Items), cluster, namespace)
}

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

func (p *pod) String() string { return p.cluster + ": " + p.namespace + "/" + p.name }

// Run implements Agent, over WebSocket, or SPDY where the API server or a proxy before it has no other.
func (p *pod) Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	request := p.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(p.namespace).Name(p.name).SubResource("exec").VersionedParams(&corev1.PodExecOptions{
		Container: install.AgentContainer, Command: append([]string{install.Program}, args...), Stdin: stdin != nil, Stdout: true, Stderr: true,
	}, scheme.ParameterCodec)
	socket, err := remotecommand.NewWebSocketExecutor(p.rest, http.MethodGet, request.URL().String())
	if err != nil {
		return err
	}
	spdy, err := remotecommand.NewSPDYExecutor(p.rest, http.MethodPost, request.URL())
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewFallbackExecutor(socket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Stderr: stderr})
	var exit exec.CodeExitError
	if errors.As(err, &exit) {
		return &ExitError{exit.Code}
	}
	return err
}
