package install

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"causeway/identity/pki"
)

// Keys of the Secret AuthorityName.
const (
	authorityCert = "ca.crt"
	authorityKey  = "ca.key"
)

// ErrNotInstalled says that a cluster has no installation in the namespace.
var ErrNotInstalled = errors.New("causeway is not installed")

// Settings say how to install.
type Settings struct {
	// ForceConflicts takes over fields that somebody else has set.
	ForceConflicts bool
	// DryRun has the API server check all, and changes nothing.
	DryRun bool
	// Report gets what becomes of each object.
	Report func(Step)
}

// NewStoreToken returns a token for a new installation.
func NewStoreToken() string { return strings.ToLower(rand.Text()) }

// Installed returns the options of the installation in a namespace; ErrNotInstalled if there is none.
func (c *Cluster) Installed(ctx context.Context, namespace string) (*Options, error) {
	kept, err := c.client.CoreV1().ConfigMaps(namespace).Get(ctx, OptionsName, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%w in the namespace %s of %s", ErrNotInstalled, namespace, c.host)
	case err != nil:
		return nil, fmt.Errorf("the API server %s: %w", c.host, err)
	}
	o := &Options{}
	if err := yaml.UnmarshalStrict([]byte(kept.Data[optionsKey]), o); err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s holds no options of this version: %w", namespace, OptionsName, err)
	}
	return o, nil
}

// Install has the cluster have what the options say: it makes what is missing, and changes what is different. Doing it again changes nothing. It does not wait for pods; see Wait.
func (c *Cluster) Install(ctx context.Context, o Options, s Settings) error {
	if err := o.Check(); err != nil {
		return err
	}
	has, err := c.Installed(ctx, o.Namespace)
	switch {
	case errors.Is(err, ErrNotInstalled):
	case err != nil:
		return err
	default:
		if err := has.fixed(&o); err != nil {
			return err
		}
	}
	objects, err := Objects(o)
	if err != nil {
		return err
	}
	all, err := entries(objects)
	if err != nil {
		return err
	}
	// The namespace first, what says what is installed next, then the authority, and last what uses it.
	first, rest := all[:2], all[2:]
	if s.DryRun {
		return c.apply(ctx, all, s.ForceConflicts, true, s.Report)
	}
	if err := c.apply(ctx, all, s.ForceConflicts, true, func(Step) {}); err != nil {
		return err
	}
	if err := c.apply(ctx, first, s.ForceConflicts, false, s.Report); err != nil {
		return err
	}
	if err := c.ensureAuthority(ctx, o, s.Report); err != nil {
		return err
	}
	return c.apply(ctx, rest, s.ForceConflicts, false, s.Report)
}

// ensureAuthority keeps the authority that there is, whoever has made it.
func (c *Cluster) ensureAuthority(ctx context.Context, o Options, report func(Step)) error {
	secrets := c.client.CoreV1().Secrets(o.Namespace)
	name := "Secret " + o.Namespace + "/" + AuthorityName
	has, err := secrets.Get(ctx, AuthorityName, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("%s: %w", name, err)
	default:
		if _, err := pki.ParseAuthority(has.Data[authorityCert], has.Data[authorityKey]); err != nil {
			return fmt.Errorf("%s: its %s and %s are no authority: %w: bring them back, or delete the Secret for a new authority, with which all peers have to be connected anew",
				name, authorityCert, authorityKey, err)
		}
		report(Step{Object: name, Did: Unchanged})
		return nil
	}
	authority, err := pki.NewAuthority(o.ClusterName, time.Now())
	if err != nil {
		return err
	}
	secret := &corev1.Secret{
		ObjectMeta: o.values().meta(AuthorityName, ""), Type: corev1.SecretTypeOpaque,
		Data: map[string][]byte{authorityCert: authority.CertPEM(), authorityKey: authority.KeyPEM()},
	}
	if _, err := secrets.Create(ctx, secret, metav1.CreateOptions{FieldManager: FieldManager}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	report(Step{Object: name, Did: Created})
	return nil
}
