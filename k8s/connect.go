package k8s

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"causeway/clustermesh"
)

// Config says how the API server is reached, and into which tables its objects go.
type Config struct {
	// Kubeconfig is a file, and Context one of it; "" is its current one.
	Kubeconfig, Context string
	// InCluster instead of that: this process is a pod with a service account.
	InCluster bool
	// Node is the name of this machine's Node.
	Node string
	// Cluster and ClusterID are the own cluster's, of which all rows are.
	Cluster   string
	ClusterID uint8
	Tables    *clustermesh.Tables
	// Refusals gets what of Services is refused.
	Refusals *clustermesh.Refusals
	// Version of this program, for the API server's log.
	Version string
	Log     *slog.Logger
}

// Requests a second, and in a burst, of this node's besides those that are long: it lists and watches four kinds of objects, and writes few Events.
const (
	requestRate  = 10
	requestBurst = 20
)

// scheme has the types that are read and written; those of all of client-go would take megabytes.
var scheme = func() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(corev1.AddToScheme(s))
	utilruntime.Must(discoveryv1.AddToScheme(s))
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	return s
}()

// Connect returns a Source that does nothing until Run. The API server need not answer now; an error is about the configuration, and has no secret of it.
func Connect(cfg Config) (*Source, error) {
	rc, err := restConfig(cfg)
	if err != nil {
		return nil, err
	}
	s := newSource(cfg)
	rc.Wrap(s.api.transport)
	if s.core, err = clientFor(rc, "/api", corev1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	if s.slices, err = clientFor(rc, "/apis", discoveryv1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	s.server = s.core.Get().URL().Host
	if u, err := url.Parse(rc.Host); err == nil && u.Host != "" {
		s.server = u.Scheme + "://" + u.Host + u.Path
	}
	return s, nil
}

func restConfig(cfg Config) (rc *rest.Config, err error) {
	switch {
	case cfg.InCluster && cfg.Kubeconfig != "":
		return nil, errors.New("kubernetes: both inCluster and kubeconfig are given; remove one")
	case cfg.InCluster:
		if rc, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("kubernetes.inCluster: %w; give a kubeconfig where the agent is no pod", err)
		}
	default:
		if rc, err = fromKubeconfig(cfg.Kubeconfig, cfg.Context); err != nil {
			return nil, err
		}
	}
	rc.UserAgent = "causeway-agent/" + cfg.Version
	rc.QPS, rc.Burst = requestRate, requestBurst
	rc.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	rc.ContentType = runtime.ContentTypeProtobuf
	rc.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	return rc, nil
}

func fromKubeconfig(file, name string) (*rest.Config, error) {
	if _, err := os.ReadFile(file); err != nil {
		return nil, fmt.Errorf("kubernetes.kubeconfig: %w", err)
	}
	loaded, err := (&clientcmd.ClientConfigLoadingRules{ExplicitPath: file}).Load()
	if err != nil { // What the parser says may quote the file.
		return nil, fmt.Errorf("kubernetes.kubeconfig %s is not a kubeconfig; kubectl --kubeconfig %s config view says what is wrong with it", file, file)
	}
	rc, err := clientcmd.NewDefaultClientConfig(*loaded, &clientcmd.ConfigOverrides{CurrentContext: name}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubernetes.kubeconfig %s: %w; it has the contexts %s", file, err, strings.Join(slices.Sorted(maps.Keys(loaded.Contexts)), ", "))
	}
	return rc, nil
}

func clientFor(rc *rest.Config, path string, version schema.GroupVersion) (rest.Interface, error) {
	of := rest.CopyConfig(rc)
	of.APIPath, of.GroupVersion = path, &version
	client, err := rest.RESTClientFor(of)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return client, nil
}
