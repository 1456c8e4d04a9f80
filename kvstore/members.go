package kvstore

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
)

// MembersConfig makes a server one of several members, which have the data as long as more than half of them live.
type MembersConfig struct {
	// ListenPeer is the "host:port" where the other members are served, over TLS. Whoever connects must show a certificate of CAFile's authority with the common name
	// of CertFile's: that authority signs for others too, which must not be members.
	ListenPeer string
	// Initial lists all members, this one among them by its name: NAME to the "host:port" that the others reach it at. It counts only for a new data directory.
	Initial map[string]string
	// Token is one for all members and for no other cluster of members. It counts only for a new data directory.
	Token string
}

const (
	// Members of a cluster are apart: etcd's own defaults are for that.
	membersTickMs     = 100
	membersElectionMs = 1000
	// membersStartTimeout is how long a member waits for the others, without whom it serves nobody.
	membersStartTimeout = 10 * time.Minute
	// rightsInterval is how soon a member sees that users' rights were changed at another one.
	rightsInterval = 250 * time.Millisecond
)

// ParseMembers reads "NAME=host:port,NAME=host:port".
func ParseMembers(text string) (map[string]string, error) {
	members := map[string]string{}
	for part := range strings.SplitSeq(text, ",") {
		name, address, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("kvstore: member %q: want NAME=host:port", part)
		}
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, fmt.Errorf("kvstore: member %s at %q: %w: want NAME=host:port", name, address, err)
		}
		if members[name] != "" {
			return nil, fmt.Errorf("kvstore: member %s is named twice", name)
		}
		members[name] = address
	}
	return members, nil
}

// several tells whether there are others.
func (m MembersConfig) several() bool { return len(m.Initial) > 0 }

func (m MembersConfig) check(name string) error {
	if !m.several() {
		if m.ListenPeer != "" || m.Token != "" {
			return errors.New("kvstore: there is an address or a token for other members and none is named: give --initial-cluster too")
		}
		return nil
	}
	if _, ok := m.Initial[name]; !ok {
		return fmt.Errorf("kvstore: this member's name %q is not among the members %s: give --name one of them",
			name, strings.Join(slices.Sorted(maps.Keys(m.Initial)), ", "))
	}
	if m.Token == "" {
		return errors.New("kvstore: members need a token that all of them have: give --initial-cluster-token")
	}
	if _, _, err := net.SplitHostPort(m.ListenPeer); err != nil {
		return fmt.Errorf("kvstore: listen address for members %q: %w: give --listen-peer host:port", m.ListenPeer, err)
	}
	return nil
}

// embed adds the members to etcd's configuration.
func (m MembersConfig) embed(ec *embed.Config, certFile, keyFile, caFile string) error {
	name, err := commonName(certFile)
	if err != nil {
		return err
	}
	ec.PeerTLSInfo = transport.TLSInfo{
		CertFile: certFile, KeyFile: keyFile, TrustedCAFile: caFile, ClientCertAuth: true, AllowedCNs: []string{name},
		// Members are known by the common name, and behind addresses that their certificates need not be for.
		SkipClientSANVerify: true,
	}
	ec.ListenPeerUrls = []url.URL{{Scheme: "https", Host: m.ListenPeer}}
	ec.AdvertisePeerUrls = []url.URL{{Scheme: "https", Host: m.Initial[ec.Name]}}
	initial := []string{}
	for _, member := range slices.Sorted(maps.Keys(m.Initial)) {
		initial = append(initial, member+"=https://"+m.Initial[member])
	}
	ec.InitialCluster, ec.InitialClusterToken = strings.Join(initial, ","), m.Token
	ec.TickMs, ec.ElectionMs = membersTickMs, membersElectionMs
	return nil
}

// commonName reads that of the first certificate of a PEM file.
func commonName(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("kvstore: read the server's certificate: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return "", fmt.Errorf("kvstore: %s holds no PEM certificate", file)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("kvstore: %s: %w", file, err)
	}
	if cert.Subject.CommonName == "" {
		return "", fmt.Errorf("kvstore: the certificate in %s has no common name, by which members know each other", file)
	}
	return cert.Subject.CommonName, nil
}

// watchRights ends the streams of limited users when rights have changed, until ctx ends: the request may have been another member's, and
// who still has the right to watch goes on where it was.
func (s *streams) watchRights(ctx context.Context, revision func() uint64, limited func(user string) bool) {
	ticker := time.NewTicker(rightsInterval)
	defer ticker.Stop()
	last := revision()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if now := revision(); now != last {
				last = now
				s.revokeLimited(limited)
			}
		}
	}
}

func (s *streams) revokeLimited(limited func(user string) bool) {
	s.mu.Lock()
	var users []string
	for user := range s.byUser {
		if limited == nil || limited(user) {
			users = append(users, user)
		}
	}
	s.mu.Unlock()
	s.revoke(users, false, errRightsChanged)
}
